"""The plugin inside a real vLLM: what it serves, what it refuses, and what stays bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bank.manifest import read_manifest
from tests.support.engine import Engine, running_engine
from tests.support.tiny import tiny_bank, tiny_model

SLOTS, CPU_TIER, NAMES, ANCHORS = 2, 6, 16, 40
STREAM_TOKENS = 1500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a context long enough for a stream that outlives a few hundred other requests."""
    return tiny_model(tmp_path_factory.mktemp("model"), context=2048)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, model: Path, embedder_folder: Path) -> Path:
    return tiny_bank(tmp_path_factory.mktemp("bank"), model, embedder_folder, anchors=ANCHORS, scale=0.2)


@pytest.fixture(scope="module")
def engine(bank: Path, model: Path) -> Iterator[Engine]:
    with running_engine(bank, model, max_loras=SLOTS, max_cpu_loras=CPU_TIER, max_adapter_names=NAMES) as engine:
        yield engine


@pytest.fixture(scope="module")
def prefix(bank: Path) -> str:
    """How this bank's recipes begin."""
    return f"mta1:{read_manifest(bank).short}:shared"


def text_of(response: httpx.Response) -> str:
    assert response.status_code == httpx.codes.OK, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def metric(engine: Engine, name: str) -> float:
    lines = engine.client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_recipe_changes_the_answer_and_the_base_model_stays_itself(engine: Engine, prefix: str) -> None:
    base = text_of(engine.chat("base"))
    fused = text_of(engine.chat(f"{prefix}:c+a03*286+a17*214"))
    assert fused != base
    assert text_of(engine.chat(f"{prefix}:c+a03*286+a17*214")) == fused
    assert text_of(engine.chat("base")) == base


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
    ("terms", "reason"),
    [
        ("a03*571+a17*428", "sum to exactly 1000"),
        ("c+a40*100", "a00 to a39"),
        (f"c:u-{'a' * 26}.{'a' * 26}", "cannot be fetched"),
        ("c:u-../../etc/passwd", "in base32"),
    ],
)
def test_a_recipe_that_cannot_be_fused_is_a_404_with_the_reason(
    engine: Engine, prefix: str, terms: str, reason: str
) -> None:
    response = engine.chat(f"{prefix}:{terms}")
    assert response.status_code == httpx.codes.NOT_FOUND
    error = response.json()["error"]
    assert error["param"] == "model"
    assert reason in error["message"]


def test_another_banks_or_methods_recipe_is_a_404(engine: Engine, prefix: str) -> None:
    short = prefix.split(":")[1]
    assert "this engine has" in engine.chat("mta1:00000000:shared:c").json()["error"]["message"]
    assert "fuses by `shared`" in engine.chat(f"mta1:{short}:cat:c").json()["error"]["message"]


def test_refusals_leave_no_name_behind(engine: Engine, prefix: str) -> None:
    before = engine.status()["names"]
    for i in range(40, 80):
        engine.chat(f"{prefix}:c+a{i}*1000")
    assert engine.status()["names"] == before


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/mta/v1/status", "/mta/v1/hint"])
def test_nothing_answers_without_the_key(engine: Engine, path: str) -> None:
    method = "GET" if path.endswith("status") else "POST"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic test-engine-key"}):
        assert (
            httpx.request(method, engine.url + path, headers=headers, json={}).status_code == httpx.codes.UNAUTHORIZED
        )


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_no_route_binds_a_name_to_a_folder(engine: Engine, path: str) -> None:
    response = engine.client.post(path, json={"lora_name": "x", "lora_path": "/etc"})
    assert response.status_code == httpx.codes.NOT_FOUND


def test_a_hint_fuses_ahead_into_the_cpu_tier(engine: Engine, prefix: str) -> None:
    recipe = f"{prefix}:c+a05*111"
    assert recipe not in engine.status()["resident"]  # type: ignore[operator]
    assert engine.client.post("/mta/v1/hint", json={"recipe": recipe}).json() == {"made": True}
    assert recipe in engine.status()["resident"]  # type: ignore[operator]
    assert engine.client.post("/mta/v1/hint", json={"recipe": recipe}).json() == {"made": False}
    assert engine.client.post("/mta/v1/hint", json={"recipe": f"{prefix}:c+a77*1"}).status_code == httpx.codes.NOT_FOUND


def test_names_and_residents_stay_bounded_and_metrics_name_no_recipe(engine: Engine, prefix: str) -> None:
    for i in range(10):
        text_of(engine.chat(f"{prefix}:c+a{i:02d}*500"))
    early = engine.client.get("/metrics").text
    for i in range(100):
        text_of(engine.chat(f"{prefix}:c+a{i % ANCHORS:02d}*{300 + i}", max_tokens=1))
    status = engine.status()
    assert status["names"] <= NAMES  # type: ignore[operator]
    assert len(status["resident"]) <= CPU_TIER  # type: ignore[arg-type]
    late = engine.client.get("/metrics").text
    assert len(late.splitlines()) == len(early.splitlines())
    assert "mta1:" not in late
    assert metric(engine, "mta:adapter_names_leased") == 0


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


def streamed_text(engine: Engine, recipe: str) -> str:
    """One long answer, streamed to its end."""
    body = {
        "model": recipe,
        "messages": [{"role": "user", "content": "hello there"}],
        "max_tokens": STREAM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    with engine.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == httpx.codes.OK, response.read()
        lines = list(response.iter_lines())
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_the_name_of_a_client_that_left_is_free_again(engine: Engine, prefix: str) -> None:
    body = {
        "model": f"{prefix}:c+a01*1",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": STREAM_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    with engine.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == httpx.codes.OK, response.read()
        lines = response.iter_lines()  # kept: httpx hangs up when the iterator goes
        next(lines)
        assert metric(engine, "mta:adapter_names_leased") == 1
    for _ in range(100):
        if metric(engine, "vllm:num_requests_running") == 0 and metric(engine, "mta:adapter_names_leased") == 0:
            return
        text_of(engine.chat("base", max_tokens=1))
    pytest.fail("the abandoned request still holds its name")
