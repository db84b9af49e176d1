"""The wheel: it has every file of the packages, and what it registers is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from deploy.wheel import build, lacking

STARTED = r"""
import re, sys
folder, *places = sys.argv[1:]
sys.path.insert(0, folder)
from importlib.util import find_spec
from pathlib import Path
for place in places:
    module, _, name = place.partition(":")
    origin = find_spec(module).origin  # importing the plugin would take vLLM, which other tests do
    assert origin.startswith(folder), origin
    assert re.search(rf"^(def|class) {name}\b", Path(origin).read_text(), re.MULTILINE), place
from server.cli import app
from demo.personas import anchors
sys.exit(app(["--version"], standalone_mode=False) or len(anchors()) != 9)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel") / "dist")


def test_wheel_has_console_demo_and_every_package_file(wheel: Path, tmp_path: Path) -> None:
    assert not lacking(wheel)
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"demo/worlds.toml", "server/gateway/routes/console/static/index.html"} <= names
    with ZipFile(tmp_path / "poor.whl", "w") as poor:
        poor.writestr("server/__init__.py", "")
    assert "server/engine/cpu/lora.cpp" in lacking(tmp_path / "poor.whl")


def test_its_entry_points_and_the_demo_start_from_it(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    registered = ConfigParser(delimiters="=")
    registered.read(tmp_path.glob("*.dist-info/entry_points.txt"))
    assert set(registered.sections()) == {"console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"}
    places = [place for group in registered.sections() for place in registered[group].values()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = (sys.executable, "-c", STARTED, str(tmp_path), *places)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:4]) == (0, "mta "), done.stderr
