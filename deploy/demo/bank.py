"""The demo's bank: built once by `mta bank build`, and again only when what it is made from changes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bank.embedder import MODEL_FILE
from bank.errors import BankError
from bank.manifest import file_sha256, read_manifest, verify_files
from bank.models import DEFAULT_MODEL, ensure_base_model, ensure_embedder, model_hash
from deploy.demo.children import DemoError, mta
from server.settings import load_settings

OUT = Path(__file__).resolve().parents[2] / "out" / "demo"

BUILD_OPTIONS = (
    *("--task", "chat"),
    *("--method", "shared"),
    "--no-common",  # an average of three manners would help none of them
    *("--steps", "20"),
    *("--learning-rate", "4e-3"),  # few steps, large ones: manners are easily learned
)
"""What the bank is built with, beyond its files; the number of anchors is the number of people."""

_FOLDER = re.compile(r"bank-[0-9a-f]{12}")
_STOP_GRACE_S = 10


def ensure_models() -> tuple[Path, Path]:
    """The folders of the default base model and the default embedder, made when they are not there yet.

    Raises:
        BankError: when one of them cannot be made.
    """
    cache_dir = load_settings().cache_dir
    return ensure_base_model(DEFAULT_MODEL, cache_dir), ensure_embedder(None, cache_dir)


def ensure_bank(people: Sequence[dict[str, object]], out: Path = OUT) -> tuple[Path, bool]:
    """The demo's bank, and whether it had to be built.

    A build that was interrupted goes on where it stopped. Banks made from other people, options or models are
    deleted.

    Args:
        people: the anchors, in LaMP's per-user layout.
        out: where banks are kept.

    Raises:
        DemoError: when the bank cannot be built.
        BankError: when a model that it needs cannot be prepared.
    """
    out.mkdir(parents=True, exist_ok=True)
    model, embedder = ensure_models()
    users = json.dumps(people, indent=1, ensure_ascii=False)
    made_from = [users, BUILD_OPTIONS, model_hash(model), file_sha256(embedder / MODEL_FILE)]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    folder = out / f"bank-{key}"
    with _locked(out / ".lock"):
        if _whole(folder):
            return folder, False
        for stale in out.iterdir():
            if stale.is_dir() and _FOLDER.fullmatch(stale.name) and stale != folder:
                shutil.rmtree(stale)
        users_file = out / "anchors.json"
        users_file.write_text(users, encoding="utf-8")
        _build(users_file, len(people), folder)
    return folder, True


def _build(users_file: Path, anchors: int, folder: Path) -> None:
    command = ("bank", "build", "--users", str(users_file), "--anchors", str(anchors), "--out", str(folder))
    with mta(*command, *BUILD_OPTIONS, grace_s=_STOP_GRACE_S) as build:
        status = build.wait()
    if status != 0:
        raise DemoError(f"`mta bank build` ended with status {status}; its message is above")


def _whole(folder: Path) -> bool:
    """Whether a finished, undamaged bank lies there; a damaged one is deleted, an unfinished one is kept."""
    try:
        verify_files(folder, read_manifest(folder))
    except BankError:
        if (folder / "bank.json").exists():
            shutil.rmtree(folder)
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build at a time; a second demo waits for the first one's bank."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
