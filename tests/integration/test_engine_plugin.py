"""The plugin inside a real vLLM: what it serves, what it refuses, and what stays bounded."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from bench.rig.engine import KEY, Engine, running_engine
from bench.rig.processes import PATIENCE_S, command_line, descendants, paused
from bench.rig.tiny import tiny_bank, tiny_model
from server.engine.admission.access import KEYED_ROUTES
from server.engine.command import is_cpu_build
from tests.support.engine import text_of

SLOTS, CPU_TIER, NAMES, ANCHORS = 2, 6, 16, 40
STREAM_TOKENS = 1500
SECRET = "unmistakable-secret-that-keys-user-ids"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a context long enough for a stream that outlives a few hundred other requests."""
    return tiny_model(tmp_path_factory.mktemp("model"), context=2048)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, model: Path, embedder_folder: Path) -> Path:
    return tiny_bank(tmp_path_factory.mktemp("bank"), model, embedder_folder, anchors=ANCHORS, scale=0.2)


@pytest.fixture(scope="module")
def engine(bank: Path, model: Path) -> Iterator[Engine]:
    sizes = {"max_loras": SLOTS, "max_cpu_loras": CPU_TIER, "max_adapter_names": NAMES}
    with running_engine(bank, model, secret=SECRET, **sizes) as engine:
        yield engine


def test_a_prompt_of_one_token_is_answered(engine: Engine) -> None:
    """It killed the engine where the CPU has AMX, on a model with as many key as query heads."""
    body = {"model": "base", "prompt": [65], "max_tokens": 2}
    response = engine.client.post("/v1/completions", json=body)
    assert response.status_code == httpx.codes.OK, response.text


def test_one_prefix_under_two_recipes_is_computed_for_each(engine: Engine, prefix: str) -> None:
    """A prefix cache shared between adapters would hand the second recipe the first one's keys and values."""
    long = "the same long question, over and over. " * 8
    alone = [text_of(engine.chat(f"{prefix}:c+a{i:02d}*1000", long)) for i in (7, 8)]
    again = [text_of(engine.chat(f"{prefix}:c+a{i:02d}*1000", long)) for i in (8, 7)]
    assert alone == again[::-1]
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("{prefix}:c+a40*100", "a00 to a39"),
        (f"{{prefix}}:c:u-{'a' * 26}.{'a' * 26}", "cannot be fetched"),
        ("{prefix}:c:u-../../etc/passwd", "in base32"),
        ("mta3:00000000:shared:c", "this engine has"),
        ("mta1:00000000:shared:c", "build its bank again"),
    ],
)
def test_a_recipe_that_cannot_be_fused_is_a_404_with_the_reason_and_leaves_no_name(
    engine: Engine, prefix: str, name: str, reason: str
) -> None:
    known = engine.status()["names"]
    response = engine.chat(name.format(prefix=prefix))
    assert response.status_code == httpx.codes.NOT_FOUND
    error = response.json()["error"]
    assert error["param"] == "model"
    assert reason in error["message"]
    assert engine.metric("mta:adapter_names_leased") == 0
    assert engine.status()["names"] == known or "u-aaa" in name  # one that could be fused but for its user adapter


@pytest.fixture(scope="module")
def routes() -> set[tuple[str, str]]:
    """Method and path of every route that vLLM's server has for a model that generates."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    level = logging.root.level
    app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",))
    logging.root.setLevel(level)  # a package that vLLM uses raises it, and no later test would see a warning
    return {
        (method, route.path.replace("{response_id}", "resp_1"))  # type: ignore[attr-defined]
        for route in app.routes
        for method in getattr(route, "methods", None) or ("GET", "POST")
    }


def test_of_all_routes_of_vllm_those_of_the_product_answer_and_with_the_key_alone(
    engine: Engine, routes: set[tuple[str, str]]
) -> None:
    some = [("POST", "/invocations"), ("POST", "/v1/chat/completions"), ("GET", "/docs"), ("POST", "/tokenize")]
    assert set(some) < routes
    ours = {("GET", "/mta/v1/status"), ("GET", "/mta/v1/resident"), ("POST", "/mta/v1/drop")}
    for method, path in routes | ours:
        known = (method, path) in KEYED_ROUTES
        for key in (None, "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY):
            headers = {"Authorization": key} if key else {}
            response = httpx.request(method, engine.url + path, headers=headers, json={"model": "base", "prompt": "x"})
            if (method, path) == ("GET", "/health"):
                assert response.status_code == httpx.codes.OK
                continue
            assert response.status_code == (httpx.codes.UNAUTHORIZED if known else httpx.codes.NOT_FOUND), path
            assert method == "HEAD" or response.json()["error"]["type"] == "invalid_request_error"
        answered = engine.client.request(method, path, json={}).status_code not in (401, 404)
        assert answered == known or path == "/health", f"{method} {path} with the key"
    assert KEYED_ROUTES - ours < routes, "a route of ours is none of vLLM's any more"


@pytest.mark.parametrize(
    "path",
    [
        *("/mta/v1/status/", "//mta/v1/status", "/mta/v1//status", "/MTA/v1/status", "/mta/v1/stat%75s"),
        *("/%6d%74a/v1/status", "/metrics/", "/metricsfoo", "/v1/models/", "/v1/../v1/models", "/health/"),
        *("/health%2f", "/health/../invocations"),
    ],
)
def test_no_other_spelling_of_a_path_opens(engine: Engine, path: str) -> None:
    host, port = engine.url.removeprefix("http://").split(":")
    for key in ("", f"Authorization: Bearer {KEY}\r\n"):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw:  # clients would normalise it
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{key}Connection: close\r\n\r\n".encode())
            assert raw.recv(1 << 16).split()[1] == b"404"


@pytest.mark.parametrize("path", ["/v1/realtime", "/health"])
def test_no_websocket_opens(engine: Engine, path: str) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert engine.client.get(path, headers=upgrade).status_code == httpx.codes.FORBIDDEN


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


@pytest.mark.skipif(not is_cpu_build(), reason="where vLLM uses a GPU it starts its core as it likes")
def test_its_core_is_a_fork_and_no_other_process_is_beside_it(engine: Engine) -> None:
    """A core that was spawned would have imported all of vLLM again, and have a resource tracker beside it."""
    assert ["EngineCore" in command_line(pid) for pid in descendants(engine.pid)] == [True]


def test_none_of_its_processes_has_the_secret_of_users(engine: Engine) -> None:
    for pid in (engine.pid, *descendants(engine.pid)):
        assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert SECRET not in command_line(pid)


def test_names_and_residents_stay_bounded_and_metrics_name_no_recipe(engine: Engine, prefix: str) -> None:
    for i in range(10):
        text_of(engine.chat(f"{prefix}:c+a{i:02d}*500"))
    early = engine.client.get("/metrics").text
    for i in range(100):
        text_of(engine.chat(f"{prefix}:c+a{i % ANCHORS:02d}*{300 + i}", max_tokens=1))
    status = engine.status()
    assert status["names"] <= NAMES  # type: ignore[operator]
    assert len(engine.resident()["resident"]) <= CPU_TIER
    late = engine.client.get("/metrics").text
    assert len(late.splitlines()) == len(early.splitlines())
    assert "mta3:" not in late
    assert engine.metric("mta:adapter_names_leased") == 0


def test_a_stream_keeps_its_adapter_while_everything_else_would_evict_it(engine: Engine, prefix: str) -> None:
    """More recipes than slots, CPU tier and names together, each beside a long answer under one recipe."""
    recipe = f"{prefix}:c+a39*777"
    alone = text_of(engine.chat(recipe, max_tokens=STREAM_TOKENS, ignore_eos=True))
    others = [f"{prefix}:c+a{i % 39:02d}*{1 + i}" for i in range(2 * (SLOTS + CPU_TIER + NAMES))]
    with ThreadPoolExecutor(4) as pool:
        while others:  # one stream may end before they are through; then another is intact too
            stream = pool.submit(streamed_text, engine, recipe)
            while others and not stream.done():
                batch, others = others[:3], others[3:]
                for response in pool.map(lambda name: engine.chat(name, max_tokens=1), batch):
                    text_of(response)
            # Batched beside others a bf16 near-tie may fall the other way; a wrong adapter changes the text at once.
            assert stream.result()[:8] == alone[:8]


def streaming(engine: Engine, recipe: str) -> AbstractContextManager[httpx.Response]:
    """One long answer."""
    messages = [{"role": "user", "content": "hello there"}]
    body = {"model": recipe, "messages": messages, "max_tokens": STREAM_TOKENS, "temperature": 0, "ignore_eos": True}
    return engine.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True})


def streamed_text(engine: Engine, recipe: str) -> str:
    """One long answer, streamed to its end."""
    with streaming(engine, recipe) as response:
        assert response.status_code == httpx.codes.OK, response.read()
        lines = list(response.iter_lines())
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]  # a last chunk has the usage alone
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_the_name_of_a_client_that_left_is_free_again(engine: Engine, prefix: str) -> None:
    with streaming(engine, f"{prefix}:c+a01*1") as response:
        assert response.status_code == httpx.codes.OK, response.read()
        lines = response.iter_lines()  # kept: httpx hangs up when the iterator goes
        next(lines)
        assert engine.metric("mta:adapter_names_leased") == 1
    for _ in range(100):
        if engine.metric("vllm:num_requests_running") == 0 and engine.metric("mta:adapter_names_leased") == 0:
            return
        text_of(engine.chat("base", max_tokens=1))
    pytest.fail("the abandoned request still holds its name")
