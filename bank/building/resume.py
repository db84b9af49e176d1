"""The work folder of a build: finished pieces survive a kill, and only a build with the same inputs reuses them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.matrix import BF16_BYTES, stored
from bank.building.options import BuildOptions
from bank.building.ranks import Ranks
from bank.errors import BankError
from bank.items.histories import History
from bank.items.profile import Vectors
from bank.items.tasks import Task
from bank.manifest import MANIFEST_FILE, BankManifest, read_manifest, verify_files
from bank.models.folders import locked
from bank.models.load import resolve_dtype

WORK_FOLDER = ".build"
INPUTS = "inputs"  # name of the hash among the inputs
_PIECES, _INPUTS_FILE, _ROWS_FILE = "pieces", "inputs.json", "rows.bf16"
_BUILD_FORMAT = 12  # hashed, so increase it when the same inputs would give a different bank
Inputs = dict[str, Any]  # options by name, and a hash of all else


class Workbench:
    """The finished pieces of one build; each is written by rename, so existing pieces are complete.

    All ranks call the same methods in the same order. Only rank 0 writes to the folder, and all ranks read it.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        self.ranks = ranks

    def waiting(self, names: Sequence[str]) -> list[str]:
        """Return the names of the pieces that no earlier run finished."""
        return self.ranks.first(lambda: [name for name in names if not self._path(name).is_file()])

    def pieces(
        self, names: Sequence[str], make: Callable[[int], Vectors], done: Callable[[int], None] = lambda count: None
    ) -> list[Vectors]:
        """Return the pieces of these names; each rank computes some of the missing, given their indices in `names`.

        `done` gets the number of finished pieces, at the start and after each one.
        """
        missing = self.waiting(names)
        done(len(names) - len(missing))
        for position, piece in enumerate(self.ranks.each([names.index(name) for name in missing], make)):
            if not self.ranks.rank:
                self._write(missing[position], piece)
            done(len(names) - len(missing) + position + 1)
        self.ranks.first(lambda: None)  # the last piece is on the disk
        return [np.load(self._path(name)) for name in names]

    def finished_rows(self, width: int) -> int:
        path = self._folder / _ROWS_FILE
        return self.ranks.first(lambda: path.stat().st_size // (BF16_BYTES * width) if path.exists() else 0)

    def rows(self, count: int, width: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Return rows [count, width] bf16, which all ranks map from one file; each rank computes some of the missing.

        Rows are appended in order, so that the file's length tells how many are finished.
        """
        path, finished = self._folder / _ROWS_FILE, self.finished_rows(width)
        for position, row in enumerate(self.ranks.each(range(finished, count), make), finished):
            if not self.ranks.rank:
                with path.open("ab") as file:
                    file.truncate(BF16_BYTES * width * position)  # a run may have been killed within a row
                    file.write(stored(row))
                    file.flush()
                    os.fsync(file.fileno())
        self.ranks.first(lambda: None)
        mapped = torch.from_file(str(path), shared=True, size=count * width, dtype=torch.bfloat16)
        return mapped.view(count, width)

    def _write(self, name: str, made: Vectors) -> None:
        draft = self._folder / "draft"
        with draft.open("wb") as file:
            np.save(file, made)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path(name))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"


@contextmanager
def workbench(out: Path, inputs: Inputs, ranks: Ranks, *, force: bool = False) -> Iterator[tuple[Workbench, Inputs]]:
    """Lock and open the work folder of the bank at `out`; remove it if the block succeeds.

    Also return the inputs with their dtype: `auto` is what the pieces were made with, else what suits rank 0's machine.
    BankError if the pieces are of other inputs, unless `force`, which deletes them.
    """
    root = out / WORK_FOLDER
    try:
        with ExitStack() as lock:
            begun = ranks.first(lambda: _begin(root, inputs, lock, force=force))
            told = ranks.each(range(ranks.count), lambda _: _differences(_recorded(root), inputs))
            if other := ", ".join(filter(None, told)):
                raise BankError(
                    f"the ranks would build different banks ({other}): give every machine the same people, options and "
                    "model, and an --out that all of them share"
                )
            yield Workbench(root / _PIECES, ranks), begun
            if not ranks.rank:
                shutil.rmtree(root, ignore_errors=True)
    except BlockingIOError:
        raise BankError(f"another build is running in {out}: wait for it or name another --out") from None
    except OSError as error:
        raise BankError(f"cannot build a bank in {out}: {error}") from error


def _begin(root: Path, inputs: Inputs, lock: ExitStack, *, force: bool) -> Inputs:
    """Take the lock, record the inputs unless the folder has pieces of the same, and return them with their dtype."""
    root.mkdir(parents=True, exist_ok=True)
    lock.enter_context(locked(root / "lock", wait=False))
    recorded = _recorded(root)
    if not (other := _differences(recorded, inputs)):
        return {**inputs, "dtype": recorded["dtype"]}
    if not force and any(root.glob("*/*.npy")):
        raise BankError(
            f"{root.parent} holds the unfinished build of another bank ({other}): run that again, name another --out, "
            "or start anew with --force"
        )
    for path in filter(Path.is_dir, list(root.iterdir())):
        shutil.rmtree(path)
    (root / _PIECES).mkdir()
    begun = {**inputs, "dtype": resolve_dtype(inputs["dtype"])}
    (root / _PIECES / _INPUTS_FILE).write_text(json.dumps(begun), "utf-8")
    return begun


def _recorded(root: Path) -> Inputs:
    """Return the inputs of the pieces in this work folder; empty if there are none, or an earlier version made them."""
    try:
        return dict(json.loads((root / _PIECES / _INPUTS_FILE).read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def _differences(recorded: Inputs, inputs: Inputs) -> str:
    """Say how inputs differ from those that were recorded; empty if both make the same bank."""
    changed = [
        f"--{name.replace('_', '-')} was {recorded[name]}, is {value}"
        for name, value in inputs.items()
        if name in recorded and name not in (INPUTS, "verdict") and value not in (recorded[name], "auto")
    ]  # the verdict only decides which people are held out, and those are hashed
    same = changed or recorded.get(INPUTS) == inputs[INPUTS]
    return ", ".join(changed) if same else "other people, texts or models, or another version of this program"


def finished_bank(out: Path, inputs: Inputs, *, force: bool) -> BankManifest | None:
    """Return the folder's bank if a build with these inputs made it; BankError for another bank unless `force`."""
    if not (out / MANIFEST_FILE).exists():
        return None
    try:
        manifest = read_manifest(out)
        if not (other := _differences(manifest.training, inputs)):
            verify_files(out, manifest)
            shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)  # left by a build that was killed at its end
            return manifest
        what = f"another bank, {manifest.short} ({other})"
    except BankError as error:
        what = f"a bank that cannot be used ({error})"
    if force:
        return None
    raise BankError(f"{out} holds {what}: name another --out, or replace it with --force")


def build_inputs(
    options: BuildOptions, task: Task, people: Sequence[History], held_out: Sequence[History], models: Sequence[str]
) -> Inputs:
    """Return the options, and a SHA-256 (64 hex digits) of all else that determines the bank: equal ones, equal banks.

    `models` are hashes of base model, prompts and embedder. `held_out` decides the verdict.
    """

    def contents(people: Sequence[History]) -> list[object]:
        return [[person.user_id, [[item.id, dict(item.fields)] for item in person.items]] for person in people]

    content = [_BUILD_FORMAT, dataclasses.asdict(task), contents(people), contents(held_out), list(models)]
    return {**options.record(), INPUTS: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
