"""Adapters under evaluation, and reading examples with them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe
from adapters.training.attached import Attached, attached
from adapters.training.example import Example
from adapters.training.forward.shared_part import SharedPart, shared_part_of
from adapters.training.loss import score
from adapters.user_adapter import UserAdapter, stack
from bank.building.assemble import BASELINES
from bank.errors import BankError
from bank.lookup.phrases import NO_PHRASES, TrustedPhrases
from bank.lookup.prior import SCORES
from bank.lookup.serving import ServingBank
from bank.manifest import BankManifest
from bank.matrix import open_matrix, shared_part
from bank.models.mixing import PhraseSlots, window_of

WRITTEN_TOKENS, TEMPERATURE = 160, 0.7


@dataclass(frozen=True)
class OpenBank:
    """A bank with its lookups (`serving`) and its rows (`matrix`)."""

    serving: ServingBank
    matrix: MetaMatrix
    folder: Path

    @classmethod
    def open(cls, folder: Path, embedder_id: str) -> OpenBank:
        serving = ServingBank.open(folder, embedder_id)
        return cls(serving, open_matrix(folder, serving.manifest), folder)

    @cached_property
    def task_bank(self) -> OpenBank:
        """The bank of the task row, which was trained from this bank's common row; BankError if there is none."""
        folder = self.folder / BASELINES
        found = OpenBank.open(folder, self.manifest.embedder.id) if folder.is_dir() else None
        if found is None or found.manifest.training.get("of") != self.manifest.fingerprint:
            reason = "belongs to another bank" if found else "is missing"
            raise BankError(f"the task row {reason} ({folder}): build the bank at {self.folder} again with --baselines")
        return found

    @cached_property
    def shared(self) -> SharedPart | None:
        return shared_part(self.matrix, self.manifest)

    @property
    def manifest(self) -> BankManifest:
        return self.serving.manifest


@dataclass(frozen=True, slots=True)
class EvalAdapter:
    """A recipe of a bank, with few-shot weights stacked on it if trained."""

    bank: OpenBank
    recipe: FusionRecipe
    trained: LoraWeights | None = None

    @property
    def user_adapter(self) -> UserAdapter | None:
        return UserAdapter(self.recipe.name, self.trained) if self.trained else None

    def lora(self) -> LoraWeights:
        """Return recipe and trained weights as one LoRA, float32."""
        fused, user = fuse(self.bank.matrix, self.recipe, torch.float32), self.user_adapter
        return stack(fused, user, torch.float32) if user else fused


@dataclass(frozen=True, slots=True)
class Reading:
    loss: float  # mean over the output tokens, in nats per token
    answer: str | None  # greedy answer to the prompt, without special tokens; None if not requested
    chances: Sequence[float] = ()  # of each of `SCORES` as first token; empty if not requested or of several tokens


class Scorer:
    """A base model with changing adapters; attaching is costly, so an attached one gets new weights while R stays."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._current: Attached | None = None
        self._fits: tuple[int, SharedPart | None] = 0, None  # rank and shared part of what is attached
        self._attached = ExitStack()

    def bare(self) -> Any:
        """Detach any adapter and return the base model."""
        self._attached.close()
        self._current = None
        return self._model

    def read(
        self,
        adapter: EvalAdapter | None,
        examples: Sequence[Example],
        new_tokens: int = 0,
        *,
        chances: bool = False,
        phrases: TrustedPhrases = NO_PHRASES,
    ) -> list[Reading]:
        """Read examples, and answer their prompts if `new_tokens` > 0; `chances` requests the field of `Reading`.

        `phrases` are mixed into answers; into what is read they are mixed by the examples themselves.
        """
        ids = [self.tokenizer.encode(score, add_special_tokens=False) for score in SCORES] if chances else []
        among = [one[0] for one in ids] if all(len(one) == 1 for one in ids) else []
        model = self._model_with(adapter)
        found = score(model, examples, among)
        no_answers: list[Any] = [None] * len(found)
        answers = self._generate(model, examples, new_tokens, phrases) if new_tokens else no_answers
        return [Reading(loss, answer, likely) for (loss, likely), answer in zip(found, answers, strict=True)]

    def write(
        self,
        adapter: EvalAdapter | None,
        examples: Sequence[Example],
        texts: int,
        phrases: TrustedPhrases = NO_PHRASES,
        temperature: float = TEMPERATURE,
    ) -> list[list[str]]:
        """Sample `texts` answers per prompt in one batch, since a decoding step costs little more with many rows."""
        model = self._model_with(adapter)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            written = self._generate(model, examples, WRITTEN_TOKENS, phrases, texts=texts, temperature=temperature)
        return [written[first : first + texts] for first in range(0, len(written), texts)]

    @torch.no_grad()
    def first_token_ms(self, adapter: EvalAdapter | None, example: Example) -> float:
        model = self._model_with(adapter)
        ids = torch.tensor([example.ids[: example.loss_from]]).to(model.device)
        start_s = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1).logits.argmax().item()  # waits for a GPU to finish
        return (time.perf_counter() - start_s) * 1e3

    @torch.no_grad()
    def _generate(
        self,
        model: Any,
        examples: Sequence[Example],
        new_tokens: int,
        phrases: TrustedPhrases,
        *,
        texts: int = 1,
        temperature: float = 0.0,
    ) -> list[str]:
        """Generate `texts` answers per prompt, grouped by prompt; each prompt is read once. Greedy at temperature 0."""
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        part = shared_part_of(model)
        begins = [len(part.prefix(example)) if part else 0 for example in examples]
        before = _padded([example.ids[:begin] for example, begin in zip(examples, begins, strict=True)], pad)
        own = [example.ids[begin : example.loss_from] for example, begin in zip(examples, begins, strict=True)]
        ids, mask = (torch.cat(parts, 1).to(model.device) for parts in zip(before, _padded(own, pad), strict=True))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache: Any = None
        first, width = before[0].shape[1], ids.shape[1]
        for reader, start, stop in ((part, 0, first), (None, first, width - 1)):
            if start < stop:
                head = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
                with attached(model, reader.lora) if reader else nullcontext():
                    read = model(ids[:, start:stop], **head, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = read.past_key_values
        cache.batch_repeat_interleave(texts)
        made = model.generate(
            input_ids=ids.repeat_interleave(texts, 0),
            attention_mask=mask.repeat_interleave(texts, 0),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            logits_processor=[_Mixing(phrases)] if phrases else [],
            **sampling,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)]

    def _model_with(self, adapter: EvalAdapter | None) -> Any:
        if adapter is None:
            return self.bare()
        lora, shared = adapter.lora(), adapter.bank.shared
        if self._current is None or self._fits != (lora.rank, shared):
            self._current = self._attached.enter_context(attached(self.bare(), lora, shared=shared))
            self._fits = lora.rank, shared
        self._current.put(lora)
        return self._current.model


def _padded(ids: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids padded on the left, [B, T], and a mask with 1 for each id and 0 for padding."""
    width = max(map(len, ids))
    padded = torch.tensor([[pad] * (width - len(one)) + list(one) for one in ids], dtype=torch.long)
    return padded, torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids], dtype=torch.long)


class _Mixing:
    """A logits processor for one call of `generate`: mixes one user's table into every row, as an engine does."""

    def __init__(self, phrases: TrustedPhrases) -> None:
        self._phrases = phrases
        self._begin = 0  # length of the prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        if not self._begin:
            self._begin, self._slots = input_ids.shape[1], PhraseSlots(len(rows), scores.shape[1], scores.device)
            for row in range(len(scores)):
                self._slots.put(row, self._phrases)
        answers = input_ids[:, self._begin :].tolist()
        windows = torch.tensor([window_of(answer, len(answer)) for answer in answers], device=scores.device)
        mixed = scores.float()
        self._slots.count(rows, windows)
        self._slots.mix(mixed, rows, rows, windows)
        return mixed
