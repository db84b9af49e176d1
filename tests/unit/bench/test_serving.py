"""What benchmarks measure and start, what those of serving refuse, whom they ask as, and the tables they make."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import typer
from aiohttp import web
from aiohttp.test_utils import TestServer
from anyio.from_thread import BlockingPortal, start_blocking_portal
from transformers import AutoModelForCausalLM

from adapters.errors import MtaError
from adapters.recipe import parse_recipe
from adapters.training.trainer import linear_modules
from bank.manifest import PosteriorRule, WeightRule, read_manifest
from bank.matrix import open_matrix
from bench.rig import client as rig
from bench.rig.client import until_signed
from bench.rig.engine import KEY, Engine
from bench.rig.limits import BF16_BYTES, Model
from bench.rig.servers import vllm_command
from bench.rig.subject import Subject, configured_subject, random_subject
from bench.rig.tiny import tiny_bank, weightless_model
from bench.rig.up import up_command
from bench.serving import cold, cost, gateway, stall, thrash
from bench.serving.load import Ask, loading
from mta_client import Client
from server.engine.command import engine_command
from server.settings import Settings

TOKEN_S = 0.001
OWN_KEY = "mta_of_the_reader"


class Streaming:
    """Streams as many tokens as it is asked for, and refuses the model `bad`; in an event loop of another thread."""

    def __init__(self, portal: BlockingPortal) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.loaded: list[str] = []
        self.open = self.most = 0  # streams at once
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        self.server = TestServer(app)
        portal.call(self.server.start_server)
        url = str(self.server.make_url("")).rstrip("/")
        self.engine = Engine(url, 0, httpx.Client(base_url=url))

    async def _load(self, request: web.Request) -> web.Response:
        self.loaded.append((await request.json())["lora_name"])
        return web.Response(text="ok")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("Authorization", ""))
        if body["model"] == "bad":
            return web.json_response({"error": "no such model"}, status=404)
        self.open += 1
        self.most = max(self.most, self.open)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(TOKEN_S)
            await response.write(f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n".encode())
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"], "prompt_tokens": 3}}
        await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        self.open -= 1
        return response


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Streaming]]:
    """The servers that a benchmark starts, by flavour."""
    with start_blocking_portal() as portal:
        servers = {flavour: Streaming(portal) for flavour in ("ours", "stock")}
        for module in (stall, thrash):
            monkeypatch.setattr(
                module, "vllm_server", lambda _, flavour="ours", **__: nullcontext(servers[flavour].engine)
            )
        yield servers
        for server in servers.values():
            server.engine.client.close()
            portal.call(server.server.close)


def table(out: Path) -> list[dict[str, Any]]:
    (found,) = json.loads(out.read_text("utf-8"))["tables"]
    return [dict(zip(found["columns"], line, strict=True)) for line in found["lines"]]


async def test_stream_has_first_token_and_gaps_and_failure_ends_run(stand: dict[str, Streaming]) -> None:
    async with loading(stand["ours"].engine) as (loader,):
        answer = await loader.stream(Ask("a", [5, 6, 7], 4))
        assert (answer.tokens, len(answer.gaps_ms)) == (4, 3)
        assert answer.first_ms > 0
        (body,) = stand["ours"].bodies
        sent = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        assert body.items() >= sent.items()
        with pytest.raises(RuntimeError, match="bad was not answered"):
            await loader.together([Ask("a", [1], 1), Ask("bad", [1], 1)])


def test_users_go_round_on_both_sides(stand: dict[str, Streaming], tmp_path: Path) -> None:
    thrash.main(tiny_model=True, users=[3, 6], clients=2, requests=6, rounds=2, tokens=3, out=tmp_path / "thrash.json")
    rows = table(tmp_path / "thrash.json")
    sides = [(users, server) for users in (3, 6) for server in ("ours", "stock vLLM")]
    assert [(row["users"], row["server"]) for row in rows] == sides
    assert rows[0]["tokens/s over 3 users'"]["median"] == 1
    assert all(row["tokens/s"]["n"] == 2 and row["first token p99, ms"] >= row["first token p50, ms"] for row in rows)
    for server in stand.values():
        assert (server.most, server.keys) == (2, {f"Bearer {KEY}"})
        assert len({body["cache_salt"] for body in server.bodies}) == len(server.bodies)
        asked = Counter(body["model"] for body in server.bodies)
        # three blocks of six at each of two levels: the first three users take turns in both
        assert sorted(asked.values()) == [3, 3, 3, 9, 9, 9]
    assert len(stand["stock"].loaded) == 6
    assert set(stand["stock"].loaded) == {body["model"] for body in stand["stock"].bodies}


def test_never_seen_users_come_once_and_resident_ones_again(stand: dict[str, Streaming], tmp_path: Path) -> None:
    out = tmp_path / "stall.json"
    stall.main(tiny_model=True, per_s=200, arrivals=8, streams=2, pairs=2, slots=8, out=out)
    rows = table(out)
    assert [row["who arrives"] for row in rows] == list(stall.KINDS)
    assert rows[0]["p99 over resident's"]["n"] == 2
    assert rows[1]["p99 over resident's"] is None
    assert rows[2]["first token of who arrives, ms"] is None
    arrived = Counter(body["model"] for body in stand["ours"].bodies if body["max_tokens"] == 1)
    resident = {body["model"] for body in stand["ours"].bodies if body["max_tokens"] == 2}
    assert len(resident) == stall.RESIDENT
    assert {arrived[name] for name in resident} == {6}  # three blocks of eight over four of them
    assert sum(arrived[name] == 1 for name in arrived.keys() - resident) == 3 * 8


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"tiny_model": True, "bank": Path("bank")}, "--tiny"),
        ({"bank": Path("bank"), "rank": [32]}, "--rank"),
        ({"only": ["1 stream", "no such text"]}, "--only"),
        ({"only": ["over 16 recipes"], "slots": [16, 8]}, "--slots"),
    ],
)
def test_cost_refuses_what_it_would_ignore(given: dict[str, Any], hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTA_BANK", raising=False)
    with pytest.raises(typer.BadParameter) as refused:
        cost.main(**given)
    assert refused.value.param_hint == hint


def test_wait_ends_when_all_users_who_can_be_are_signed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule, looks, keys = ["signature"], Counter[str](), set[str | None]()
    known = dict.fromkeys(("updated_at", "recipe", "embedder"), "") | {"items": 3, "bytes": 9, "anchors": []}

    def answer(request: httpx.Request) -> httpx.Response:
        """A worker reads one user's items with every look at them; it never signs whoever is `plain`."""
        keys.add(request.headers.get("Authorization"))
        if request.url.path == "/bank":
            return httpx.Response(200, json={"rule": {"name": rule[0]}})
        user = request.url.path.rpartition("/")[2]
        looks[user] += 1
        source = "signature" if user != "plain" and looks[user] > int(user) else "topic"
        return httpx.Response(
            200, json=known | {"user_id": user, "at": None, "phrases": None, "adapter": None, "source": source}
        )

    passed_s = itertools.count(step=rig.PATIENCE_S / 9)
    monkeypatch.setattr(rig, "time", SimpleNamespace(monotonic=passed_s.__next__, sleep=lambda _: None))
    monkeypatch.setenv("MTA_API_KEY", OWN_KEY)
    transport = httpx.MockTransport(answer)
    with ExitStack() as stack:
        plain = stack.enter_context(httpx.Client(transport=transport))
        client = stack.enter_context(Client("http://mta", transport=transport))
        monkeypatch.setattr(httpx, "get", plain.get)
        assert until_signed(client, ["0", "2", "plain", "5"]) == {"plain"}
        assert (looks["0"], looks["2"], looks["5"]) == (1, 3, 6)
        assert keys == {f"Bearer {OWN_KEY}"}
        rule[0] = "topic"
        looks.clear()
        assert until_signed(client, ["0", "plain"]) == {"0", "plain"}
        assert not looks


def test_the_key_goes_to_the_gateway_and_the_engine_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "put_profile", lambda *_: SimpleNamespace(recipe="mta3:00000000:shared:c"))
    for key, shown in ((OWN_KEY, {"Authorization": f"Bearer {OWN_KEY}"}), ("", {})):
        monkeypatch.setenv("MTA_API_KEY", key)
        sides = gateway._sides("http://gateway", "http://engine", "inner", 4)
        assert sides["gateway"].headers == shown
        assert sides["engine"].headers == {"Authorization": "Bearer inner"}


PORT = 12_345


@pytest.fixture
def subject(tiny_bank_folder: Path, tiny_model_folder: Path) -> Subject:
    return Subject(tiny_bank_folder, tiny_model_folder, read_manifest(tiny_bank_folder))


@pytest.mark.parametrize("rule", [WeightRule(), WeightRule(posterior=PosteriorRule())])
def test_recipe_names_are_fusible_distinct_and_enough(subject: Subject, rule: WeightRule) -> None:
    subject = replace(subject, manifest=subject.manifest.model_copy(update={"weights": rule}))
    names = subject.names(3000)
    assert len(set(names)) == 3000
    assert subject.names(20) == names[:20] != subject.names(20, seed=1)
    for recipe in map(parse_recipe, names[:100]):
        subject.manifest.check(recipe)
        assert len(recipe.terms) == (len(subject.manifest.anchors) if rule.posterior else rule.anchors)


def test_too_few_anchors_and_a_missing_bank_are_explained(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lonely = tiny_bank(tmp_path, tiny_model_folder, embedder_folder, anchors=1, k=1)
    with pytest.raises(MtaError, match="makes only 1 recipes"):
        Subject(lonely, tiny_model_folder, read_manifest(lonely)).names(2)
    monkeypatch.delenv("MTA_BANK", raising=False)
    with pytest.raises(MtaError, match="MTA_BANK"):
        configured_subject(None, None)


def test_random_bank_has_its_rank_and_model_needs_no_weights(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path
) -> None:
    made = random_subject(tmp_path, str(tiny_model_folder), 16, anchors=3)
    assert (made.manifest.rank, made.manifest.serving_rank, made.manifest.user_rank) == (16, 16, 0)
    assert open_matrix(made.bank, made.manifest).rows.shape[0] == 4  # the common row beside them
    wide = random_subject(tmp_path, str(tiny_model_folder), directions=20)
    assert (wide.manifest.directions, wide.merged_rows, wide.manifest.rank) == (20, 20, 8)
    assert [len(recipe.steps) for recipe in itertools.islice(wide.recipes(), 2)] == [20, 20]
    with pytest.raises(typer.BadParameter, match="leave out --bank and --tiny"):
        cold.main(directions=20, tiny_model=True)
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    model = weightless_model(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2, **shape)
    manifest = read_manifest(tiny_bank(tmp_path / "bank", model, embedder_folder))
    sizes = {module.name.rpartition(".")[2]: (module.h_in, module.h_out) for module in manifest.modules}
    assert len(manifest.modules) == 3 * 7
    assert (sizes["k_proj"], sizes["down_proj"]) == ((32, 16), (48, 32))


def test_step_bytes_and_prompt_flops_equal_counts_on_a_model(subject: Subject) -> None:
    shape, manifest = Model.read(subject.model), subject.manifest
    layout, model = manifest.layout, AutoModelForCausalLM.from_pretrained(subject.model)
    assert shape.weights == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    alone, one, two = (shape.step_bytes(10, n, manifest) for n in (0, 1, 2))
    assert alone == shape.step_bytes(10)
    assert one - alone == (layout.a_numbers + layout.b_numbers) * BF16_BYTES
    assert two - one == layout.b_numbers * BF16_BYTES  # a shared A is read once
    assert shape.step_bytes(7) - shape.step_bytes(0) == 7 * 2 * 2 * 2 * 32 * BF16_BYTES  # K and V, layers, heads, size
    body = sum(m.h_in * m.h_out for m in linear_modules(model))
    attention = 4 * 2 * 2 * 32 * 50**2 // 2  # two products of 2 operations, layers, heads, size, half of it masked
    assert shape.prompt_flops(50) == 2 * body * 50 + attention + 2 * (shape.weights - body)  # the head once
    adapter = 2 * 50 * (layout.a_numbers + layout.b_numbers)
    assert shape.prompt_flops(50, manifest) - shape.prompt_flops(50) == adapter


def test_ours_is_the_product_command_and_plain_has_no_lora(
    subject: Subject,
) -> None:
    settings = Settings(bank=subject.bank, engine_port=PORT, engine_key=KEY, max_num_seqs=16, max_loras=3)  # type: ignore[arg-type]
    ours, _ = made = vllm_command(subject, "ours", PORT, max_loras=3)
    assert made == engine_command(settings, [subject.manifest], subject.model)
    stock, environment = vllm_command(subject, "stock", PORT, max_loras=3)
    assert set(ours) - set(stock) == {
        *("--worker-extension-cls", "server.engine.fusing.manager.WorkerExtension"),
        *("--scheduler-cls", "server.engine.admission.fair_scheduler.FairScheduler"),
    }
    assert set(stock) <= set(ours)
    told = [environment[name] for name in ("VLLM_PLUGINS", "MTA_BANK", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")]
    assert told == ["", "", "1"]
    plain, environment = vllm_command(subject, "plain", PORT, max_loras=3, max_cpu_loras=77)
    assert not any("lora" in argument for argument in plain)
    assert not {"--enforce-eager", "3", "77", *subject.manifest.target_modules} & set(plain)
    kept = ("--model", "--dtype", "--max-num-seqs", "--port", "--host", "--served-model-name")
    assert all(ours[ours.index(name) :][:2] == plain[plain.index(name) :][:2] for name in kept)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment


def test_only_the_embedder_and_the_cache_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MTA_CACHE_DIR", "MTA_EMBEDDER", "MTA_MODEL", "MTA_SECRET"):
        monkeypatch.setenv(name, "the caller's")
    _, environment = up_command(tmp_path)
    assert {"MTA_MODEL", "MTA_SECRET"} <= {name for name, value in environment.items() if value is None}
    assert not {"MTA_CACHE_DIR", "MTA_EMBEDDER"} & environment.keys()
