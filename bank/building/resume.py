"""The work folder of a build: what is finished survives a kill, and the next run of the same build continues from it.

Its name is the hash of all inputs and options: pieces of another build are never used.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bank.building.options import BuildOptions
from bank.building.selection import SERVED_ITEMS
from bank.errors import BankError
from bank.items.histories import History
from bank.items.profile import Vectors
from bank.items.tasks import Task
from bank.manifest import MANIFEST_FILE, BankManifest, read_manifest, verify_files

WORK_FOLDER = ".build"
_BUILD_FORMAT = 6  # part of the key: raise it when the same inputs would give another bank


class Workbench:
    """The finished pieces of one build; each is put in place by rename, so what is there is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def vectors(self, name: str, make: Callable[[], Vectors]) -> Vectors:
        """The array of this name, made now if no earlier run made it; on disk when this returns."""
        if not self.has(name):
            made, draft = make(), self._folder / "draft"
            with draft.open("wb") as file:
                np.save(file, made)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path(name))
        vectors: Vectors = np.load(self._path(name))
        return vectors

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"


@contextmanager
def workbench(out: Path, key: str) -> Iterator[Workbench]:
    """The work folder of the build `key` of the bank at `out`, held by one process; removed if the block succeeds."""
    root = out / WORK_FOLDER
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise BankError(f"cannot build a bank in {out}: {error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BankError(f"another build is running in {out}: wait for it or name another --out") from None
        for other in root.iterdir():
            if other.is_dir() and other.name != key:
                shutil.rmtree(other)
        folder = root / key
        folder.mkdir(exist_ok=True)
        yield Workbench(folder)
        shutil.rmtree(root)
    finally:
        os.close(handle)


def finished_bank(out: Path, key: str, *, force: bool) -> BankManifest | None:
    """The folder's bank if the build `key` made it; None when there is none to keep. Another needs `force`."""
    if not (out / MANIFEST_FILE).exists():
        return None
    try:
        manifest = read_manifest(out)
        if manifest.training.get("inputs") == key:
            verify_files(out, manifest)
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
    """SHA-256 (64 hex digits) of all that decides what the bank will be: equal keys, equal banks.

    The options are resolved; `models` are hashes of base model, prompts and embedder. The bank is measured on those
    `held_out`, and the verdict is a part of it.
    """

    def contents(people: Sequence[History]) -> list[object]:
        return [[person.user_id, [[item.id, dict(item.fields)] for item in person.items]] for person in people]

    chosen = dataclasses.asdict(options)
    del chosen["verdict"]  # what follows from it is who is left out
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
