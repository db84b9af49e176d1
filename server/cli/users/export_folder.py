"""The export of a user as a folder: `user.json`, and `adapter/` where they have one."""

from __future__ import annotations

import base64
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import orjson

from adapters.errors import MtaError
from bank.peft.exported import CONFIG_FILE, WEIGHTS_FILE

USER_FILE = "user.json"
ADAPTER_FOLDER = "adapter"


def default_folder(user_id: str) -> Path:
    """Where an export goes by default: no id is ever part of a path."""
    return Path(f"export-{hashlib.sha256(user_id.encode()).hexdigest()[:16]}")


def write_export(out: Path, document: dict[str, Any]) -> list[Path]:
    """Write what `GET /users/{id}/export` answered to a folder that is not there yet or empty; returns the files.

    Only its owner can read the folder, which appears when it is complete.

    Raises:
        MtaError: when the folder holds something, or cannot be written.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise MtaError(f"{out} is not empty: name another folder with --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
        try:
            names = _write(draft, document)
            draft.replace(out)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except OSError as error:
        raise MtaError(f"cannot write the export to {out}: {error}") from error
    return [out / name for name in names]


def _write(folder: Path, document: dict[str, Any]) -> list[str]:
    names = [USER_FILE]
    adapter = document.get("adapter")
    if adapter and (peft := adapter.pop("peft", None)):
        inner = folder / ADAPTER_FOLDER
        inner.mkdir()
        (inner / CONFIG_FILE).write_bytes(orjson.dumps(peft["config"], option=orjson.OPT_INDENT_2))
        (inner / WEIGHTS_FILE).write_bytes(base64.b64decode(peft["weights"]))
        adapter["folder"] = ADAPTER_FOLDER
        names += [f"{ADAPTER_FOLDER}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)]
    (folder / USER_FILE).write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    return names
