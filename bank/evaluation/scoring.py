"""Losses and predictions of a model under an adapter: what is asked of whoever has one, and the way in process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from adapters.attached import Attached, attached
from adapters.lora import LoraWeights
from adapters.loss import example_losses, likeliest
from adapters.packing import Example
from bank.evaluation.voices import Voice
from bank.prompt import EncodedPair

_FEW = 4
"""Answers of at most so many tokens are quicker to read off packed prompts than to generate with a cache."""


class Scores(Protocol):
    """Whoever speaks with a voice: a model in process, or a running engine (`server.eval_engine`)."""

    def losses(self, voice: Voice | None, examples: Sequence[Example]) -> list[float]:
        """Mean loss of each example's output tokens, nats a token; without a voice of the base model."""

    def predictions(self, voice: Voice | None, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
        """Greedy answers, without special tokens.

        Args:
            voice: whose; the base model's without one.
            prompts: token ids, the generation prompt of the chat template included.
            new_tokens: longest answer.
        """


class Scorer:
    """A base model that adapters are put on, one after the other.

    Attaching costs more than a pass over a few examples, so an attached adapter stays, and gets other numbers, until
    one of another rank comes or the bare model is wanted.

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
        """The base model without anything on it, for who attaches something of their own."""
        self._attached.close()
        self._here = None
        return self._model

    def losses(self, voice: Voice | None, examples: Sequence[Example]) -> list[float]:
        """As in `Scores`."""
        with self._under(voice) as model:
            return example_losses(model, examples)

    def predictions(self, voice: Voice | None, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
        """As in `Scores`."""
        with self._under(voice) as model:
            few = new_tokens <= _FEW
            made = _read_off(model, prompts, new_tokens) if few else self._generated(model, prompts, new_tokens)
        texts: list[str] = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def _generated(self, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> Any:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        return made[:, width:]

    @contextmanager
    def _under(self, voice: Voice | None) -> Iterator[Any]:
        if voice is not None:
            yield self._with(voice.lora()).model
        elif self._here is None:
            yield self._model
        else:
            with self._here.model.disable_adapter():
                yield self._here.model

    def _with(self, lora: LoraWeights) -> Attached:
        if self._here is None or self._rank != lora.rank:
            here = self._attached.enter_context(attached(self.bare(), lora))
            self._here, self._rank = here, lora.rank
        self._here.put(lora)
        return self._here


def _read_off(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of a few tokens, from the prompts packed into rows once a token."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    made: list[list[int]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        open_ended = [place for place, ids in enumerate(made) if not (ids and ids[-1] in ends)]
        asked = [(*prompts[place], *made[place]) for place in open_ended]
        examples = [EncodedPair((*ids, 0), len(ids)) for ids in asked]  # 0 stands where the next id will
        for place, token in zip(open_ended, likeliest(model, examples), strict=True):
            made[place].append(token)
    return made
