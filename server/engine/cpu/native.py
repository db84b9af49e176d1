"""Build the CPU kernels once per source and PyTorch version, and load them from the cache. Does not import torch."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sysconfig
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bank.models.folders import locked

log = logging.getLogger("vllm.mta")

SOURCES = (Path(__file__).with_name("lora.cpp"), Path(__file__).with_name("rows.h"))
NAME = "mta_cpu"
FLAGS = ["-O3", "-fopenmp", "-Wno-psabi"]


def library_path(cache_dir: Path) -> Path:
    """Return the library's path, which depends on source, compiler flags, PyTorch version and processor family."""
    sources = (source.read_text(encoding="utf-8") for source in SOURCES)
    inputs = (*sources, *FLAGS, version("torch"), platform.machine())
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    return cache_dir / "kernels" / digest / f"{NAME}.so"


def build(cache_dir: Path) -> bool:
    """Compile the library if missing, in 10 to 30 s; log the reason and return False if that fails."""
    path = library_path(cache_dir)
    if path.exists():
        return True
    if missing := missing_tools():
        log.warning(
            "the CPU kernel cannot be compiled, so personal answers take twice as long: install %s", ", ".join(missing)
        )
        return False
    log.info("compiling the CPU kernel (only once)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / "lock"), TemporaryDirectory(dir=path.parent) as folder:
            if not path.exists():
                _compile(folder)
                (Path(folder) / path.name).rename(path)
    except (RuntimeError, OSError, ImportError) as error:
        log.warning("the CPU kernel did not compile, so personal answers take twice as long: %s", error)
        return False
    return True


def missing_tools() -> list[str]:
    tools = {"c++": "g++", "ninja": "ninja"}
    return [package for tool, package in tools.items() if shutil.which(tool, path=_search_path()) is None]


def _search_path() -> str:
    """Return PATH with this Python environment's programs, ninja among them: `mta` may run without it in PATH."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))


def _compile(folder: str) -> None:
    from torch.utils import cpp_extension

    os.environ["PATH"] = _search_path()
    cpp_extension.load(NAME, [str(SOURCES[0])], extra_cflags=FLAGS, is_python_module=False, build_directory=folder)


@cache
def kernels(cache_dir: Path) -> Any | None:
    """Return PyTorch's namespace of the library's operators (lora.cpp); None if the library cannot be compiled."""
    import torch

    if not build(cache_dir):
        return None
    if not hasattr(torch.ops.mta_cpu, "lora_linear_"):  # already loaded in the process that compiled the library
        torch.ops.load_library(library_path(cache_dir))  # type: ignore[no-untyped-call]
    return torch.ops.mta_cpu
