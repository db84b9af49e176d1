"""What the gateway process loads: neither torch nor vLLM, and nothing that its image would lack."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement

HEAVY = {"torch", "vllm", "transformers", "peft", "sklearn", "scipy", "triton"}

LOAD = """
import importlib.abc, json, sys

class Image(importlib.abc.MetaPathFinder):
    # Stands in for an environment without the packages named in argv.
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Image())
from server.gateway.app import create_app
from server.settings import Settings
import server.cli.run.gateway
create_app(Settings()).openapi()
import faiss, onnxruntime, tokenizers, uvicorn, uvloop  # what it loads once it serves
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_gateway_starts_where_only_its_own_requirements_are_installed_and_loads_nothing_heavy() -> None:
    image = _closure("mta-server")
    outside = {
        module
        for module, distributions in packages_distributions().items()
        if image.isdisjoint(map(_canonical, distributions))
    }
    assert {"torch", "vllm", "transformers"} <= outside
    for missing in (outside, set()):  # without them, and where nobody would notice
        command = [sys.executable, "-c", LOAD, json.dumps(sorted(missing))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        loaded = set(json.loads(done.stdout))
        assert "fastapi" in loaded
        assert not loaded & HEAVY


def _closure(root: str) -> set[str]:
    """A distribution and all that it requires, extras only where a requirement names them."""
    found: set[str] = set()
    queue = [(root, frozenset[str]())]
    while queue:
        name, extras = queue.pop()
        found.add(name)
        try:
            requirements = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        for requirement in requirements:
            environments = [{"extra": extra} for extra in (extras or {""})]
            applies = requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments)
            child = _canonical(requirement.name)
            if applies and (child not in found or requirement.extras):
                queue.append((child, frozenset(requirement.extras)))
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
