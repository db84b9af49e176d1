"""The mixture as a logits processor of vLLM's second model runner, which GPUs use: answers lie on the device.

Nothing here waits for the device, so that scheduling stays asynchronous. vLLM's front end imports this module too, to
check requests, so torch is not imported at the top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from bank.lookup.phrases import NOTHING, START
from server.engine.phrases.arguments import phrases_of

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class GpuPhraseProcessor(LogitsProcessor):  # type: ignore[misc]
    """Mixes each request's own table into its own row; rows without one cost nothing."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        from bank.models.mixing import PhraseSlots

        self._states = req_states
        self._slots = PhraseSlots(req_states.max_num_reqs, req_states.vocab_size, req_states.device)
        self._has = np.zeros(req_states.max_num_reqs, bool)  # which slots have a table
        self._resumed: list[int] = []  # slots whose answer has begun before

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        phrases_of(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        phrases = phrases_of(sampling_params)
        self._has[req_idx] = phrases is not None
        if phrases is not None:
            self._slots.put(req_idx, phrases)
            self._resumed.append(req_idx)
        return phrases is not None

    def apply_staged_writes(self) -> None:
        """Count what an answer that was preempted has used, but for its last token, which the next step counts."""
        import torch

        for slot in self._resumed:
            begin, end = (int(of.np[slot]) for of in (self._states.prompt_len, self._states.prefill_len))
            if end > begin + 1:
                lengths = torch.arange(begin + 1, end, device=self._states.device)
                slots = torch.full_like(lengths, slot)
                self._slots.count(slots, self._windows(slots, lengths))
        self._resumed.clear()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        import torch

        rows_np = np.flatnonzero(self._has[ctx.idx_mapping_np])
        if not len(rows_np):
            return logits
        rows = torch.from_numpy(rows_np).to(logits.device, non_blocking=True)
        slots, lengths = ctx.expanded_idx_mapping[rows].long(), ctx.pos[rows].long() + 1
        windows = self._windows(slots, lengths)
        is_last = lengths >= self._states.prefill_len.gpu[slots]  # no part of a prompt that is still being read
        self._slots.count(slots, windows.where(is_last[:, None], NOTHING))
        self._slots.mix(logits, rows, slots, windows)
        return logits

    def _windows(self, slots: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the last K + 1 tokens [N, K + 1] of the answers in `slots` [N], of requests of so many tokens [N]."""
        import torch

        from bank.models.mixing import WINDOW

        positions = lengths[:, None] + torch.arange(-WINDOW, 0, device=lengths.device)
        begin = self._states.prompt_len.gpu[slots].long()[:, None]
        tokens = self._states.all_token_ids.gpu[slots[:, None], positions.clamp(min=0)].long()
        before = torch.where(positions == begin - 1, START, NOTHING)
        return torch.where(positions >= begin, tokens, before)
