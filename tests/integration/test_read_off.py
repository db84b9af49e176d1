"""Answers of a few tokens, read off the gold as far as the two agree, are those that transformers generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.training.example import Example
from bank.evaluation.scoring import Scorer
from bank.items.prompt import chat_messages, prompt_ids
from bank.models.load import load_base

TURNS = ("Say 1", "Say something about trains", "And?")
TOKENS = 4


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    return load_base(tiny_model_folder, "float32")


def generated(model: Any, prompt: Sequence[int]) -> list[int]:
    """The greedy answer to one prompt."""
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("agreed", range(TOKENS + 1))
def test_whatever_the_gold_shares_with_the_answer(
    base: tuple[Any, Any], agreed: int, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = base
    prompts = [prompt_ids(tokenizer, chat_messages(turn)) for turn in TURNS]
    if ended:  # the first answer's third token ends answers from now on
        monkeypatch.setattr(model.generation_config, "eos_token_id", generated(model, prompts[0])[2])
    wanted = [generated(model, prompt) for prompt in prompts]
    assert (len(wanted[0]) < TOKENS) is ended
    golds = [[*ids[:agreed], *((token + 1) % 100 for token in ids[agreed:]), 7] for ids in wanted]
    examples = [Example((*p, *gold), len(p)) for p, gold in zip(prompts, golds, strict=True)]
    readings = Scorer(model, tokenizer).read(None, examples, TOKENS)
    assert [reading.answer for reading in readings] == [text.strip() for text in decoded(tokenizer, wanted)]


def decoded(tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts
