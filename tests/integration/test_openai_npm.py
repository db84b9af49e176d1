"""OpenAI's official npm client on the gateway over a real vLLM; what it is asked stands in `openai_npm.mjs`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from bench.rig.engine import KEY, Engine
from bench.rig.valkey import free_port
from server.settings import Settings
from tests.support.gateway import GatewayThread
from tests.support.node import run_module

MODULE = Path(__file__).with_name("openai_npm.mjs")
NAMES = re.findall(r"^test\('(.+)', ", MODULE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    gateway_over_vllm: GatewayThread,
    gateway_settings: Settings,
    tiny_engine: Engine,
) -> Mapping[str, str]:
    """What node's own test runner says of each test: `ok`, or what was wrong."""
    folder = tmp_path_factory.mktemp("npm")
    shutil.copy(MODULE, folder)
    nowhere = gateway_settings.model_copy(update={"engine_url": f"http://127.0.0.1:{free_port()}"})
    with GatewayThread(nowhere) as without_engine:
        urls = {
            "GATEWAY_URL": gateway_over_vllm.url,
            "NOWHERE_URL": without_engine.url,
            "ENGINE_URL": tiny_engine.url,
            "ENGINE_KEY": KEY,
        }
        done = run_module(folder, MODULE.name, "--test-reporter=tap", environment=urls)
    parts = re.split(r"^((?:not )?ok) \d+ - (.*)\n", done.stdout, flags=re.MULTILINE)[1:]
    found = {name: word if word == "ok" else told for word, name, told in zip(*[iter(parts)] * 3, strict=True)}
    assert found, done.stderr
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_npm_client(results: Mapping[str, str], name: str) -> None:
    assert results[name] == "ok", results[name]
