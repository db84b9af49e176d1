"""The plugin inside a real vLLM: what it serves, what it refuses, and what stays bounded."""

from __future__ import annotations

import http.client
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from bank.models.folders import model_config, prompt_hashes
from bench.rig.engine import KEY, Engine, running_engine
from bench.rig.processes import PATIENCE_S, command_line, descendants, paused, wait_until
from bench.rig.valkey import ValkeyProcess
from server.cli.run.needs import BF16, GIB, token_bytes
from server.engine.admission.access import KEYED_ROUTES
from server.engine.command import is_cpu_build
from server.settings import Settings
from tests.support.gateway import content_of

SLOTS, CPU_TIER, NAMES, ANCHORS = 2, 6, 24, 40
LONG = 1500  # tokens
OLD_KEY = "another-key-that-is-to-go"
SECRET = "unmistakable-secret-that-keys-user-ids"


@pytest.fixture(scope="module")
def engine(bank: Path, model: Path, valkey: ValkeyProcess) -> Iterator[Engine]:
    sizes = {"max_loras": SLOTS, "max_cpu_loras": CPU_TIER}
    settings = sizes | {"redis_url": valkey.url, "secret": SECRET, "engine_key": f"{KEY},{OLD_KEY}"}
    with running_engine(bank, model, **settings) as engine:
        yield engine


def test_a_prompt_of_one_token_is_answered(engine: Engine) -> None:
    """It killed the engine where the CPU has AMX, on a model with as many key as query heads."""
    response = engine.client.post("/v1/completions", json={"model": "base", "prompt": [65], "max_tokens": 2})
    assert response.status_code == httpx.codes.OK, response.text


def test_token_takes_the_computed_size_of_the_kv_cache(engine: Engine, model: Path) -> None:
    [line] = [line for line in engine.client.get("/metrics").text.splitlines() if line.startswith("vllm:cache_config")]
    found = dict(re.findall(r'(\w+)="([^"]*)"', line))
    tokens = int(found["num_gpu_blocks"]) * int(found["block_size"])
    expected = Settings().kv_cache_gib * GIB / token_bytes(model_config(model), BF16)
    assert tokens == pytest.approx(expected, rel=0.01)


def test_one_prefix_under_two_recipes_is_computed_for_each(engine: Engine, prefix: str) -> None:
    """A prefix cache shared between adapters would hand the second recipe the first one's keys and values."""
    long = "the same long question, over and over. " * 8
    alone = [content_of(engine.chat(f"{prefix}:c+a{i:02d}*1000", long)) for i in (7, 8)]
    again = [content_of(engine.chat(f"{prefix}:c+a{i:02d}*1000", long)) for i in (8, 7)]
    assert alone == again[::-1]
    assert alone[0] != alone[1]


def test_unfusable_recipe_is_404_with_reason_and_no_lease(engine: Engine, prefix: str) -> None:
    known = engine.status()["names"]
    for name, reason, left in (
        (f"{prefix}:c+a40*100", "a00 to a39", 0),
        (
            f"{prefix}:c:u-{'a' * 26}.{'a' * 26}",
            "does not exist; the plain recipe is",
            1,
        ),  # all but the user adapter could be fused
    ):
        response = engine.chat(name)
        assert response.status_code == httpx.codes.NOT_FOUND
        assert response.json()["error"]["param"] == "model"
        assert reason in response.json()["error"]["message"]
        assert engine.metric("mta:adapter_names_leased") == engine.status()["user_adapters"] == 0
        assert engine.status()["names"] == known + left


def test_product_routes_need_a_key_and_other_routes_are_404(engine: Engine) -> None:
    posts = ("/invocations", "/v1/responses", "/v1/load_lora_adapter", "/detokenize", "/v1/embeddings", "/pause")
    gets = ("/docs", "/openapi.json", "/version", "/load", "/ping", "/server_info", "/v1/chat/completions", "/tokenize")
    for method, path in KEYED_ROUTES | {("POST", path) for path in posts} | {("GET", path) for path in gets}:
        known = (method, path) in KEYED_ROUTES
        for key in (None, f"Bearer {KEY}x", f"Basic {KEY}"):
            headers = {"Authorization": key} if key else {}
            response = httpx.request(method, engine.url + path, headers=headers, json={"model": "base", "prompt": "x"})
            assert response.status_code == (httpx.codes.UNAUTHORIZED if known else httpx.codes.NOT_FOUND), path
            assert response.json()["error"]["type"] == "invalid_request_error"
        for good in (KEY, OLD_KEY):
            response = engine.client.request(method, path, json={}, headers={"Authorization": f"Bearer {good}"})
            assert (response.status_code not in (401, 404, 405)) == known, f"{method} {path} with the key {good}"
    assert httpx.get(f"{engine.url}/health").status_code == httpx.codes.OK


def test_no_other_spelling_of_a_path_opens(engine: Engine) -> None:
    host, port = engine.url.removeprefix("http://").split(":")
    for path in (
        *("/mta/v1/status/", "//mta/v1/status", "/mta/v1//status", "/MTA/v1/status", "/mta/v1/stat%75s"),
        *("/%6d%74a/v1/status", "/metrics/", "/metricsfoo", "/v1/models/", "/v1/../v1/models", "/health/"),
        *("/health%2f", "/health/../invocations"),
    ):
        for key in ("", f"Authorization: Bearer {KEY}\r\n"):
            with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw:  # clients would normalise it
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{key}Connection: close\r\n\r\n".encode())
                assert raw.recv(1 << 16).split()[1] == b"404", path


def test_a_preflight_request_opens_nothing(engine: Engine) -> None:
    asks = {"Origin": "http://anywhere", "Access-Control-Request-Method": "POST"}
    response = engine.client.options("/v1/chat/completions", headers=asks)
    assert response.status_code == httpx.codes.NOT_FOUND
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_its_status_waits_for_no_step_of_the_model(engine: Engine) -> None:
    core = next(pid for pid in descendants(engine.pid) if "EngineCore" in command_line(pid))
    with paused(core):
        status = engine.client.get("/mta/v1/status", timeout=20)
    assert status.json()["banks"] == engine.status()["banks"]


def test_its_status_tells_the_prompts_of_its_model(engine: Engine, model: Path) -> None:
    assert engine.status()["prompts"] == prompt_hashes(model)


def test_request_sent_while_the_server_is_paused_is_answered(engine: Engine) -> None:
    """It closed the connection unread: it had been idle for more than the 5 s that vLLM allows."""
    connection = http.client.HTTPConnection(engine.url.removeprefix("http://"), timeout=PATIENCE_S)
    with closing(connection):
        connection.request("GET", "/health")
        connection.getresponse().read()
        time.sleep(0.5)  # the server sends an answer before it notes that the connection is idle
        with paused(engine.pid):
            connection.request("GET", "/health")
            time.sleep(6)
        assert connection.getresponse().status == httpx.codes.OK


def test_engine_core_is_a_fork_and_no_process_has_the_secret(engine: Engine) -> None:
    """A core that was spawned would have imported all of vLLM again, and have a resource tracker beside it."""
    others = descendants(engine.pid)
    if is_cpu_build():  # where vLLM uses a GPU it starts its core as it likes
        assert ["EngineCore" in command_line(pid) for pid in others] == [True]
    for pid in (engine.pid, *others):
        assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert SECRET not in command_line(pid)


def test_names_stay_bounded_and_metrics_name_no_recipe(engine: Engine, prefix: str) -> None:
    for i in range(10):
        content_of(engine.chat(f"{prefix}:c+a{i:02d}*500"))
    early = engine.client.get("/metrics").text
    for i in range(100):
        content_of(engine.chat(f"{prefix}:c+a{i % ANCHORS:02d}*{300 + i}", max_tokens=1))
    assert engine.status()["names"] <= NAMES  # type: ignore[operator]
    assert len(engine.resident()["resident"]) <= CPU_TIER
    late = engine.client.get("/metrics").text
    assert len(late.splitlines()) == len(early.splitlines())
    assert "mta3:" not in late
    assert engine.metric("mta:adapter_names_leased") == 0


def test_long_answer_keeps_its_adapter_while_others_are_evicted(engine: Engine, prefix: str) -> None:
    """More recipes than slots, CPU tier and names together, each beside a long answer under one recipe."""

    def long_answer() -> str:
        return content_of(engine.chat(f"{prefix}:c+a39*777", max_tokens=LONG, ignore_eos=True))

    alone = long_answer()
    others = [f"{prefix}:c+a{i % 39:02d}*{1 + i}" for i in range(3 * (SLOTS + CPU_TIER + NAMES) // 2)]
    with ThreadPoolExecutor(4) as pool:
        while others:  # one answer may end before they are through; then another is intact too
            beside = pool.submit(long_answer)
            while others and not beside.done():
                batch, others = others[:3], others[3:]
                for response in pool.map(lambda name: engine.chat(name, max_tokens=1), batch):
                    content_of(response)
            # Batched beside others a bf16 near-tie may fall the other way; a wrong adapter changes the text at once.
            assert beside.result()[:8] == alone[:8]


def test_the_name_of_a_client_that_left_is_free_again(engine: Engine, prefix: str) -> None:
    metrics = ("mta:adapter_names_leased", "mta:adapters_in_use")
    with engine.long_answer(f"{prefix}:c+a01*1") as lines:
        next(lines)
        assert [*map(engine.metric, metrics)] == [1, 1]
    wait_until(lambda: not any(map(engine.metric, metrics)), "the abandoned request to be over")
