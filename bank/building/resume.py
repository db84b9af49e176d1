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

import numpy as np

from bank.building.options import BuildOptions
from bank.building.ranks import Ranks
from bank.building.selection import SERVED_ITEMS
from bank.errors import BankError
from bank.items.histories import History
from bank.items.profile import Vectors
from bank.items.tasks import Task
from bank.manifest import MANIFEST_FILE, BankManifest, read_manifest, verify_files
from bank.models.folders import locked

WORK_FOLDER = ".build"
_BUILD_FORMAT = 11  # part of the key; increase it when the same inputs would give a different bank


class Workbench:
    """The finished pieces of one build; each is written by rename, so existing pieces are complete.

    All ranks call the same methods in the same order. Only rank 0 reads and writes the folder.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        self.ranks = ranks

    def waiting(self, names: Sequence[str]) -> list[str]:
        """Return the names of the pieces that no earlier run finished."""
        return self.ranks.first(lambda: [name for name in names if not self._path(name).is_file()])

    def piece(self, name: str, make: Callable[[], Vectors]) -> Vectors:
        """Return the piece of this name; all ranks compute it together if no earlier run did."""
        made = make() if self.waiting([name]) else None
        return self.ranks.first(lambda: self._read(name) if made is None else self._write(name, made))

    def pieces(
        self, names: Sequence[str], make: Callable[[int], Vectors], done: Callable[[int], None] = lambda count: None
    ) -> list[Vectors]:
        """Return the pieces of these names; each rank computes some of the missing ones, given their places in `names`.

        `done` gets the number of finished pieces, at the start and after each one.
        """
        missing = self.waiting(names)
        done(len(names) - len(missing))
        for place, piece in enumerate(self.ranks.each([names.index(name) for name in missing], make)):
            if not self.ranks.rank:
                self._write(missing[place], piece)
            done(len(names) - len(missing) + place + 1)
        return self.ranks.first(lambda: [self._read(name) for name in names])

    def _read(self, name: str) -> Vectors:
        vectors: Vectors = np.load(self._path(name))
        return vectors

    def _write(self, name: str, made: Vectors) -> Vectors:
        draft = self._folder / "draft"
        try:
            with draft.open("wb") as file:
                np.save(file, made)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path(name))
        except OSError as error:
            raise BankError(f"cannot keep a piece of the build in {self._folder}: {error.strerror or error}") from error
        return made

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"


@contextmanager
def workbench(out: Path, key: str, ranks: Ranks) -> Iterator[Workbench]:
    """Lock and open the work folder of build `key` of the bank at `out`; remove it if the block succeeds."""
    root = out / WORK_FOLDER
    if ranks.rank:
        yield Workbench(root / key, ranks)
        return
    with ExitStack() as lock:
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock.enter_context(locked(root / "lock", wait=False))
            for other in root.iterdir():
                if other.is_dir() and other.name != key:
                    shutil.rmtree(other)
            folder = root / key
            folder.mkdir(exist_ok=True)
        except BlockingIOError:
            raise BankError(f"another build is running in {out}: wait for it or name another --out") from None
        except OSError as error:
            raise BankError(f"cannot build a bank in {out}: {error}") from error
        yield Workbench(folder, ranks)
        shutil.rmtree(root, ignore_errors=True)


def finished_bank(out: Path, key: str, *, force: bool) -> BankManifest | None:
    """Return the folder's bank if build `key` made it, else None; BankError for another bank unless `force`."""
    if not (out / MANIFEST_FILE).exists():
        return None
    try:
        manifest = read_manifest(out)
        if manifest.training.get("inputs") == key:
            verify_files(out, manifest)
            shutil.rmtree(out / WORK_FOLDER / key, ignore_errors=True)  # left by a build that was killed at its end
            return manifest
        found = f"another bank, {manifest.short}"
    except BankError as error:
        found = f"a bank that cannot be used ({error})"
    if force:
        return None
    raise BankError(f"{out} holds {found}: name another --out, or replace it with --force")


def inputs_key(
    options: BuildOptions, task: Task, people: Sequence[History], held_out: Sequence[History], models: Sequence[str]
) -> str:
    """Return the SHA-256 (64 hex digits) of everything that determines the bank: equal keys mean equal banks.

    The options are resolved; `models` are hashes of base model, prompts and embedder. `held_out` decides the verdict.
    """

    def contents(people: Sequence[History]) -> list[object]:
        return [[person.user_id, [[item.id, dict(item.fields)] for item in person.items]] for person in people]

    chosen = dataclasses.asdict(options)
    del chosen["verdict"]  # it only decides which people are held out, and those are hashed below
    content = {
        "format": _BUILD_FORMAT,
        "options": chosen,
        "task": dataclasses.asdict(task),
        "people": contents(people),
        "aside": contents(held_out),
        "models": list(models),
        "served_items": SERVED_ITEMS,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
