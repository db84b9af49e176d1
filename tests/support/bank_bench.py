"""Banks of a tiny model, built again and again from the same few people, and damaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from adapters.matrix import MetaMatrix
from adapters.training.trainer import StepReport
from bank.building.build import build_bank
from bank.building.options import BuildInputs, BuildOptions
from bank.building.progress import RowProgress
from bank.building.ranks import joined
from bank.manifest import BankManifest
from bank.matrix import open_matrix
from bench.rig.people import people, write_people

_SIZES = {"anchors": 3, "rank": 4, "user_rank": 4, "steps": 3, "common_steps": 3, "batch_size": 4}
OPTIONS = BuildOptions("chat", **_SIZES, common_batch_size=4, learning_rate=1e-2, history_share=0.0, dtype="float32")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Recorder(RowProgress):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.begun: list[str] = []
        self.steps: list[tuple[str, int]] = []
        self.pieces: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, work_tokens: Mapping[str, int]) -> None:
        self.begun += work_tokens
        assert all(tokens > 0 for tokens in work_tokens.values())

    def step(self, row: str, steps: int, report: StepReport) -> None:
        self.steps.append((row, report.step))

    def piece(self, what: str, done: int, of: int) -> None:
        self.pieces.append((what, done, of))


class Bench:
    """Builds banks of the same people into folders of their own."""

    def __init__(self, folder: Path, model: Path, embedder: Path) -> None:
        self.folder, self.model, self.embedder = folder, model, embedder
        self.users = write_people(folder / "users.json", people(5))

    def inputs(self, name: str, **changes: Any) -> BuildInputs:
        where = BuildInputs(self.users, self.folder / name, str(self.model), self.folder, embedder=self.embedder)
        return dataclasses.replace(where, **changes)

    def build(self, name: str, progress: Recorder | None = None, *, inputs: Any = None, **changes: Any) -> BankManifest:
        options = dataclasses.replace(OPTIONS, **changes)
        return build_bank(self.inputs(name, **(inputs or {})), options, progress or Recorder())

    def build_by_ranks(self, name: str, count: int, progress: RowProgress) -> BankManifest:
        inputs = self.inputs(name)
        with joined(count, partial(build_bank, inputs, OPTIONS, RowProgress())) as ranks:
            return build_bank(inputs, OPTIONS, progress, ranks)

    def matrix(self, name: str, manifest: BankManifest) -> MetaMatrix:
        return open_matrix(self.folder / name, manifest)
