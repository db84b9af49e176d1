"""The work folder of a build: what is reused, what is refused, and how rows are kept."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bank.building.options import BuildOptions
from bank.building.ranks import Ranks
from bank.building.resume import WORK_FOLDER, Inputs, Workbench, build_inputs, workbench
from bank.errors import BankError
from bank.items.histories import History
from bank.items.profile import Item
from bank.items.tasks import get_task

CHAT, OPTIONS = get_task("chat"), BuildOptions("chat", dtype="float32")
ITEM = Item("1", {"input": "i", "output": "o"})
PEOPLE = [History("somebody", (ITEM,)), History("another", (ITEM,))]
MODELS = ("model", "prompts", "embedder")


def inputs(people: Any = PEOPLE, aside: Any = (), models: Any = MODELS, **changes: Any) -> Inputs:
    return build_inputs(replace(OPTIONS, **changes), CHAT, people, aside, models)


def stop_after_a_piece(out: Path, begun_with: Inputs, *, force: bool = False) -> list[str]:
    """Make one piece, unless it is there, then end as if killed; return the names of the pieces made."""
    made = list[str]()

    def make(place: int) -> np.ndarray:
        made.append("piece")
        return np.zeros(1)

    with suppress(KeyboardInterrupt), workbench(out, begun_with, Ranks(), force=force) as (work, _):
        work.pieces(["piece"], make)
        raise KeyboardInterrupt
    return made


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": 9}, r"--steps was 8, is 9\)"),
        ({"target_modules": ("q_proj", "v_proj")}, "--target-modules was None, is q_proj,v_proj"),
        ({"learning_rate": 0.002, "seed": 1}, "--learning-rate was 0.001, is 0.002, --seed was 0, is 1"),
        ({"dtype": "bfloat16"}, "--dtype was float32, is bfloat16"),
        ({"people": PEOPLE[:1]}, "other people"),
        ({"aside": PEOPLE[:1]}, "other people"),
        ({"models": ("another", "prompts", "embedder")}, "other people, texts or models"),
    ],
)
def test_other_inputs_are_refused_and_delete_nothing(tmp_path: Path, changed: Any, words: str) -> None:
    assert stop_after_a_piece(tmp_path, inputs()) == ["piece"]
    with pytest.raises(BankError, match=rf"unfinished build of another bank \({words}.*--force"):
        stop_after_a_piece(tmp_path, inputs(**changed))
    assert stop_after_a_piece(tmp_path, inputs()) == []


def test_by_force_other_inputs_begin_anew(tmp_path: Path) -> None:
    stop_after_a_piece(tmp_path, inputs())
    assert stop_after_a_piece(tmp_path, inputs(steps=9), force=True) == ["piece"]
    assert stop_after_a_piece(tmp_path, inputs(steps=9)) == []


def test_force_alone_deletes_nothing(tmp_path: Path) -> None:
    stop_after_a_piece(tmp_path, inputs())
    assert stop_after_a_piece(tmp_path, inputs(), force=True) == []


def test_whether_a_verdict_follows_is_no_other_input(tmp_path: Path) -> None:
    stop_after_a_piece(tmp_path, inputs())
    assert stop_after_a_piece(tmp_path, inputs(verdict=False)) == []


def test_what_was_begun_without_a_piece_is_no_loss(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), workbench(tmp_path, inputs(), Ranks()):
        raise KeyboardInterrupt
    assert stop_after_a_piece(tmp_path, inputs(steps=9)) == ["piece"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_goes_on_as_the_pieces_were_made(tmp_path: Path, dtype: str) -> None:
    stop_after_a_piece(tmp_path, inputs(dtype=dtype))
    with workbench(tmp_path, inputs(dtype="auto"), Ranks()) as (work, begun):
        assert not work.waiting(["piece"])
        assert begun["dtype"] == dtype


def test_the_half_build_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    piece = tmp_path / WORK_FOLDER / ("0" * 64) / "common.npy"
    piece.parent.mkdir(parents=True)
    piece.write_bytes(b"of an earlier version")
    with pytest.raises(BankError, match=r"another version of this program.*--force"):
        stop_after_a_piece(tmp_path, inputs())
    stop_after_a_piece(tmp_path, inputs(), force=True)
    assert not piece.parent.exists()


def test_rows_of_a_killed_run_are_kept_but_for_a_torn_one(tmp_path: Path) -> None:
    wanted = torch.arange(15.0).view(3, 5).bfloat16()
    with pytest.raises(IndexError):
        Workbench(tmp_path, Ranks()).rows(3, 5, list(wanted[:2]).__getitem__)
    (kept,) = tmp_path.iterdir()
    with kept.open("ab") as file:
        file.write(b"torn")
    work, made = Workbench(tmp_path, Ranks()), list[int]()
    assert work.finished_rows(5) == 2

    def make(place: int) -> torch.Tensor:
        made.append(place)
        return wanted[place].float()

    assert torch.equal(work.rows(3, 5, make), wanted)
    assert made == [2]
