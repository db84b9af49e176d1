"""The mixture as a logits processor of vLLM's first model runner, which CPUs use: answers are lists on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from bank.models.mixing import PhraseSlots, window_of
from server.engine.phrases.arguments import phrases_of


@dataclass(slots=True)
class _Answer:
    slot: int
    output: Sequence[int]  # grows with the answer
    counted: int = 0  # number of its tokens whose phrases are counted as used


class PhraseProcessor(LogitsProcessor):  # type: ignore[misc]
    """Mixes each request's own table into its own row; rows without one cost nothing."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._count = vllm_config.scheduler_config.max_num_seqs + 1  # a request that takes another's row comes first
        self._slots = PhraseSlots(self._count, vllm_config.model_config.get_vocab_size(), device)
        self._device = device
        self._answers: dict[int, _Answer] = {}  # by row

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        phrases_of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._answers, batch_update, self._begin)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._answers:
            return logits
        slots, windows = list[int](), list[list[int]]()
        for answer in self._answers.values():  # behind by one token, or by all of an answer that was preempted
            for end in range(answer.counted + 1, len(answer.output) + 1):
                slots.append(answer.slot)
                windows.append(window_of(answer.output, end))
            answer.counted = len(answer.output)
        if slots:
            self._slots.count(self._tensor(slots), self._tensor(windows))
        slots = [answer.slot for answer in self._answers.values()]
        windows = [window_of(answer.output, answer.counted) for answer in self._answers.values()]
        self._slots.mix(logits, self._tensor(list(self._answers)), self._tensor(slots), self._tensor(windows))
        return logits

    def _begin(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Answer | None:
        if (phrases := phrases_of(params)) is None:
            return None
        taken = {answer.slot for answer in self._answers.values()}
        slot = next(slot for slot in range(self._count) if slot not in taken)
        self._slots.put(slot, phrases)
        return _Answer(slot, output)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)
