"""Reading examples with a model under an adapter: the protocol, and the implementation in process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import torch

from adapters.lora import LoraWeights
from adapters.training.attached import Attached, attached
from adapters.training.example import Example
from adapters.training.loss import first_tokens, read
from bank.evaluation.speakers import PersonAdapter

WRITTEN_TOKENS, TEMPERATURE = 160, 0.7

_FEW = 4
"""Answers of at most this many tokens are quicker to read off packed rows than to generate with a cache."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model makes of one example.

    Attributes:
        loss: mean over its output tokens, nats a token.
        answer: the greedy answer to its prompt, without special tokens; None when none was asked for.
    """

    loss: float
    answer: str | None


class Scores(Protocol):
    """What reads examples under an adapter: a model in process, or a running engine (`server.cli.eval.engine`)."""

    def read(self, adapter: PersonAdapter | None, examples: Sequence[Example], new_tokens: int = 0) -> list[Reading]:
        """Read examples, and answer their prompts.

        Args:
            adapter: the one on the model; None for the base model alone.
            examples: prompt and gold.
            new_tokens: longest answer; 0 for no answers.
        """

    def write(self, adapter: PersonAdapter | None, examples: Sequence[Example], texts: int) -> list[list[str]]:
        """Answer prompts at length, at a temperature of `TEMPERATURE`, in up to `WRITTEN_TOKENS` tokens.

        Args:
            adapter: as for `read`.
            examples: prompts; their golds are not looked at.
            texts: how many to write for each prompt.
        """

    def first_token_ms(self, adapter: PersonAdapter | None, example: Example) -> float:
        """How long it takes to read a prompt of which nothing has been read before, up to the first token."""


class Scorer:
    """A base model that adapters are put on, one after the other.

    Attaching costs more than a pass over a few examples, so an attached adapter stays and gets new numbers, until
    another rank or the bare model is needed.

    Args:
        model, tokenizer: the base model's.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._here: Attached | None = None
        self._rank = 0
        self._attached = ExitStack()

    def bare(self) -> Any:
        """The base model with nothing attached, for a caller that attaches something itself."""
        self._attached.close()
        self._here = None
        return self._model

    def read(self, adapter: PersonAdapter | None, examples: Sequence[Example], new_tokens: int = 0) -> list[Reading]:
        """As in `Scores`."""
        with self._under(adapter) as model:
            readings = read(model, examples)
            losses = [loss for loss, _ in readings]
            if not new_tokens:
                return [Reading(loss, None) for loss in losses]
            if new_tokens <= _FEW:
                made = _read_off(model, examples, [likeliest for _, likeliest in readings], new_tokens)
            else:
                made = self._generated(model, examples, new_tokens)
        answers = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [Reading(loss, answer.strip()) for loss, answer in zip(losses, answers, strict=True)]

    def chances(
        self, adapter: PersonAdapter | None, examples: Sequence[Example], among: Sequence[int]
    ) -> list[list[float]]:
        """As `adapters.training.loss.first_tokens`, under an adapter."""
        with self._under(adapter) as model:
            return first_tokens(model, examples, among)

    def write(self, adapter: PersonAdapter | None, examples: Sequence[Example], texts: int) -> list[list[str]]:
        """As in `Scores`; all in one batch, for a step of many rows costs little more than one of few."""
        sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
        with self._under(adapter) as model, torch.random.fork_rng():
            torch.manual_seed(0)
            made = self._generated(model, examples, WRITTEN_TOKENS, texts, **sampling)
        written = [text.strip() for text in self.tokenizer.batch_decode(made, skip_special_tokens=True)]
        return [written[first : first + texts] for first in range(0, len(written), texts)]

    @torch.no_grad()
    def first_token_ms(self, adapter: PersonAdapter | None, example: Example) -> float:
        """As in `Scores`."""
        with self._under(adapter) as model:
            ids = torch.tensor([example.ids[: example.loss_from]]).to(model.device)
            start_s = time.perf_counter()
            model(input_ids=ids, logits_to_keep=1)
            return (time.perf_counter() - start_s) * 1e3

    @torch.no_grad()
    def _generated(
        self, model: Any, examples: Sequence[Example], new_tokens: int, texts: int = 1, **sampling: Any
    ) -> Any:
        """Token ids of so many answers to each prompt, one after the other; each prompt is read once."""
        prompts = [example.ids[: example.loss_from] for example in examples]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]).to(model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]).to(model.device)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        head = {"attention_mask": mask[:, :-1], "position_ids": places[:, :-1]}
        cache = model(ids[:, :-1], **head, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(texts)
        made = model.generate(
            input_ids=ids.repeat_interleave(texts, 0),
            attention_mask=mask.repeat_interleave(texts, 0),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            **(sampling or {"do_sample": False}),
        )
        return made[:, width:]

    @contextmanager
    def _under(self, adapter: PersonAdapter | None) -> Iterator[Any]:
        if adapter is not None:
            yield self._with(adapter.lora()).model
        elif self._here is None:
            yield self._model
        else:
            with self._here.silenced():
                yield self._here.model

    def _with(self, lora: LoraWeights) -> Attached:
        if self._here is None or self._rank != lora.rank:
            here = self._attached.enter_context(attached(self.bare(), lora))
            self._here, self._rank = here, lora.rank
        self._here.put(lora)
        return self._here


def _read_off(
    model: Any, examples: Sequence[Example], likeliest: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """Greedy answers of a few tokens; each is already known for as far as the gold agrees, and one id more.

    Args:
        model: the one that answers.
        examples: prompt and gold.
        likeliest: its likeliest id in the place of each id of the gold.
        new_tokens: longest answer.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    made = [_agreed(example, ids, ends)[:new_tokens] for example, ids in zip(examples, likeliest, strict=True)]
    while waiting := [place for place, ids in enumerate(made) if len(ids) < new_tokens and ids[-1] not in ends]:
        so_far = [(*examples[place].ids[: examples[place].loss_from], *made[place]) for place in waiting]
        asked = [Example((*ids, 0), len(ids)) for ids in so_far]  # 0 is a placeholder for the next id
        for place, (_, (token,)) in zip(waiting, read(model, asked), strict=True):
            made[place].append(token)
    return made


def _agreed(example: Example, likeliest: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The likeliest ids that are the model's own answer: to the first that differs from the gold or ends the turn."""
    gold = example.ids[example.loss_from :]
    pairs = zip(gold, likeliest, strict=True)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] and pair[1] not in ends, pairs))
    return list(likeliest[: same + 1])
