"""Anchors are described by what their rows make likelier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest

from adapters.training.example import Example
from bank.building.options import BuildOptions
from bank.building.ranks import Ranks
from bank.building.resume import Workbench
from bank.building.rows import RowTrainer
from bank.building.words import likelier_words
from bank.items.profile import Vectors
from bank.items.tasks import get_task
from tests.support.bank_bench import Recorder

TOKENS = ["ĠHazel", "Ġroses", "Ġthe", "Ġrain", "ing", "Ġof", "Ġat", "▁plums", "Ġ..."]
ROWS = np.zeros((2, len(TOKENS)))  # what each anchor adds to the logits
ROWS[0, [0, 1, 3, 4]] = 3, 3, 1, 3
ROWS[1, [2, 7]] = 3, 3


class Raising:
    """A signer of a model whose tokens are equally likely without a row."""

    def log_chances(self, steps: Vectors, examples: Sequence[Example]) -> Iterator[Vectors]:
        for logits in steps @ ROWS:
            yield np.tile(logits - np.log(np.exp(logits).sum()), (3, 1))


@pytest.fixture
def trainer() -> RowTrainer:
    tokenizer = Mock(
        __len__=lambda _: len(TOKENS),
        convert_ids_to_tokens=lambda ids: [TOKENS[token] for token in ids],
        decode=lambda ids: TOKENS[ids[0]].strip("Ġ▁"),
    )
    return RowTrainer(None, tokenizer, get_task("chat"), BuildOptions("chat"), Recorder())


def described(trainer: RowTrainer, folder: Path) -> list[tuple[str, ...]]:
    signer: Any = Raising()
    with patch("bank.building.words.encode_pair", lambda *_: Example((1, 2), 1)):
        return likelier_words(signer, 2, trainer, Workbench(folder, Ranks()))


def test_whole_words_in_lower_case_describe_an_anchor(trainer: RowTrainer, tmp_path: Path) -> None:
    assert described(trainer, tmp_path) == [("roses",), ("plums",)]


def test_a_bank_of_labels_has_no_words(trainer: RowTrainer, tmp_path: Path) -> None:
    rated = replace(trainer, task=get_task("movie_rating"))
    assert described(rated, tmp_path) == [(), ()]
