"""What every engine must do for the gateway, held against vLLM with our plugin and against the fake that tests use."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from adapters.recipe import FusionMethod, Term, UserAdapterId
from bank.manifest import read_manifest
from bench.rig.engine import KEY
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.valkey import ValkeyProcess, free_port
from server.errors import EngineFailed, InvalidRequest, Unavailable
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import AdapterMissing, EngineClient
from server.gateway.operating.health import Health
from server.store.redis.servers.connection import RedisConnection
from tests.support.engine import Subject, answer, ask, client_of, refusal
from tests.support.fake_engine import FakeEngine, Knobs

CONTEXT = 512


async def test_an_answer_comes_in_pieces_and_ends_with_reason_and_usage(client: EngineClient, subject: Subject) -> None:
    async with client.generate(ask(subject.recipe().name)) as stream:
        pieces = [text async for text, _ in stream if text]
    assert all(pieces)
    assert stream.first_token_s is not None
    assert stream.first_token_s > stream.sent_s
    assert stream.prompt_tokens == stream.usage["prompt_tokens"]
    assert (stream.finish_reason, stream.complete) == ("length", True)
    assert stream.usage["completion_tokens"] == 8
    assert stream.usage["total_tokens"] == stream.usage["prompt_tokens"] + 8


async def test_a_whole_answer_is_the_streamed_one(client: EngineClient, subject: Subject) -> None:
    request = ask(subject.recipe().name, max_tokens=24)
    async with client.generate(replace(request, stream=False)) as whole:
        pieces = [text async for text, _ in whole if text]
    assert pieces == [await answer(client, request)]
    assert whole.first_token_s is None
    assert whole.prompt_tokens == whole.usage["prompt_tokens"]
    assert (whole.finish_reason, whole.complete) == ("length", True)
    assert whole.usage["completion_tokens"] == 24


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_are_continued_without_a_chat_template(
    client: EngineClient, subject: Subject, stream: bool
) -> None:
    prompts = ["hello there", "the sea"]
    request = replace(ask(subject.recipe().name), messages=[], prompt=prompts, stream=stream)
    texts = ["", ""]
    async with client.generate(request) as answer:
        async for first, value in answer:
            assert first == (value["choices"][0]["text"] if value["choices"] else "")
            for choice in value["choices"]:
                texts[choice["index"]] += choice["text"]
    assert all(texts)
    assert (answer.finish_reason, answer.complete) == ("length", True)
    assert answer.usage["prompt_tokens"] == sum(map(len, prompts))
    assert answer.usage["completion_tokens"] == 2 * 8


async def test_greedy_answers_repeat_and_differ_between_recipes(client: EngineClient, subject: Subject) -> None:
    one, other = subject.recipe().name, subject.recipe(terms=(Term(1, 1000),)).name
    first = await answer(client, ask(one, max_tokens=24))
    assert await answer(client, ask(one, max_tokens=24)) == first
    assert await answer(client, ask(other, max_tokens=24)) != first
    assert await answer(client, ask("base", max_tokens=24)) != first


async def test_a_conversation_with_all_roles_is_taken(client: EngineClient, subject: Subject) -> None:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": f"I am the {role} 🌊"} for role in roles]
    async with client.generate(replace(ask(subject.recipe().name), messages=messages)) as stream:
        async for _ in stream:
            pass
    assert stream.usage["completion_tokens"] == 8
    assert stream.usage["prompt_tokens"] > sum(len(message["content"]) for message in messages) - 1


REFUSED = [
    (("user", "system", "user"), "the system message must come first"),
    (("user", "user"), "after user comes another role"),
    (("system", "user", "assistant", "assistant", "user"), "after assistant comes another role"),
]


@pytest.mark.parametrize(("roles", "reason"), REFUSED)
async def test_a_conversation_that_the_chat_template_refuses_is_the_conversations_fault(
    client: EngineClient, subject: Subject, roles: tuple[str, ...], reason: str
) -> None:
    messages = [{"role": role, "content": "hello"} for role in roles]
    request = replace(ask(subject.recipe().name), messages=messages, prompt_param="messages")
    error = await refusal(client, request, InvalidRequest)
    assert (error.param, error.code) == ("messages", "invalid_value")
    assert reason in error.message


@pytest.mark.parametrize(("roles", "reason"), REFUSED)
async def test_it_says_why_its_chat_template_refuses_a_conversation(
    engines: Engines, roles: tuple[str, ...], reason: str
) -> None:
    messages = [{"role": role, "content": "hello"} for role in roles]
    assert reason in str(await engines.template_refusal([*messages, {"role": "assistant", "content": "hi"}]))
    assert await engines.template_refusal([*messages[:1], {"role": "assistant", "content": "hi"}]) is None


async def test_sampling_with_a_seed_is_taken(client: EngineClient, subject: Subject) -> None:
    request = ask(subject.recipe().name, temperature=0.9, top_p=0.5, seed=7, stop=["never said"])
    assert await answer(client, request) == await answer(client, request)


@pytest.mark.parametrize(
    "changes",
    [
        {"bank": "00000000"},
        {"terms": (Term(99, 1000),)},
        {"method": FusionMethod.CAT},
        {"user_adapter": UserAdapterId("a" * 26, "a" * 26)},
    ],
)
async def test_a_recipe_that_it_cannot_serve_is_a_missing_adapter(
    client: EngineClient, subject: Subject, changes: dict[str, Any]
) -> None:
    await refusal(client, ask(subject.recipe(**changes).name), AdapterMissing)


@pytest.mark.parametrize("name", ["nonsense", "mta3:00000000:shared:c+a03*0571", "../../etc"])
async def test_a_name_that_is_no_recipe_is_a_missing_adapter(client: EngineClient, name: str) -> None:
    await refusal(client, ask(name), AdapterMissing)


@pytest.mark.parametrize("chars", [CONTEXT + 1, CONTEXT * 2, CONTEXT * 100])
async def test_a_prompt_beyond_the_context_is_the_prompts_fault(
    client: EngineClient, subject: Subject, chars: int
) -> None:
    error = await refusal(client, ask(subject.recipe().name, "x" * chars), InvalidRequest)
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert str(CONTEXT) in error.message


async def test_the_prompts_length_is_known_at_the_first_token_even_if_the_answer_will_be_cut_short(
    client: EngineClient, subject: Subject
) -> None:
    async with client.generate(ask(subject.recipe().name, "x" * (CONTEXT - 40), max_tokens=400)) as stream:
        assert stream.prompt_tokens is not None
        assert CONTEXT - 40 <= stream.prompt_tokens < CONTEXT


async def test_it_counts_the_tokens_of_a_conversation(engines: Engines) -> None:
    counts = [await engines.count_tokens([{"role": "user", "content": "x" * length}]) for length in (10, 110)]
    assert (counts[1] or 0) - (counts[0] or 0) == 100


async def test_a_wrong_key_is_the_gateways_fault(subject: Subject, session: aiohttp.ClientSession) -> None:
    for key in ("wrong", None):
        stranger = client_of(session, subject.url, key)
        error = await refusal(stranger, ask("base"), EngineFailed)
        assert error.code == "engine_key"


async def test_leaving_early_aborts(client: EngineClient, subject: Subject) -> None:
    before = subject.generated()
    async with client.generate(ask(subject.recipe().name, max_tokens=CONTEXT - 40)):
        pass  # the first token is there; a random model's first readable text may be long in coming
    await asyncio.to_thread(wait_until, subject.idle, "the engine to stop")
    assert 0 < subject.generated() - before < CONTEXT - 40


async def test_leaving_a_whole_answer_aborts(client: EngineClient, subject: Subject) -> None:
    before = subject.generated()
    request = replace(ask(subject.recipe().name, max_tokens=CONTEXT - 40), stream=False)
    asking = asyncio.create_task(answer(client, request))
    await asyncio.to_thread(wait_until, lambda: not subject.idle(), "the engine to begin")
    asking.cancel()
    await asyncio.to_thread(wait_until, subject.idle, "the engine to stop")
    assert subject.generated() - before < CONTEXT - 40


async def test_connections_are_kept(client: EngineClient, subject: Subject, session: aiohttp.ClientSession) -> None:
    made = 0

    async def count(*_: Any) -> None:
        nonlocal made
        made += 1

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(count)
    trace.freeze()
    session.trace_configs.append(trace)
    for _ in range(5):
        await answer(client, ask("base", max_tokens=2))
    assert made <= 1


async def test_nobody_there_is_unavailable(session: aiohttp.ClientSession) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    nobody = client_of(session, nowhere)
    await refusal(nobody, ask("base"), Unavailable)
    silent = Engines(session, [nowhere], KEY)
    with pytest.raises(Unavailable):
        await silent.template_refusal([{"role": "user", "content": "hello"}])
    assert await silent.count_tokens([{"role": "user", "content": "hello"}]) is None


async def test_its_status_is_understood(
    subject: Subject, session: aiohttp.ClientSession, valkey: ValkeyProcess
) -> None:
    manifest = read_manifest(subject.bank)
    store = RedisConnection(valkey.url)
    states = {}
    for key in (KEY, "wrong"):
        engines = Engines(session, [subject.url], key)
        health = Health(store, engines, [manifest.fingerprint], generating=subject.url)
        states[key] = (await health.probe()).engines[0]
        assert engines.context == (CONTEXT if key == KEY else None)
    assert (states[KEY].status, states[KEY].banks) == ("ok", (manifest.fingerprint,))
    assert states["wrong"].status == "wrong_key"
    await store.close()


async def test_its_context_stays_known_while_it_is_away(session: aiohttp.ClientSession) -> None:
    fakes = [FakeEngine(Knobs(context=context)).start() for context in (1024, CONTEXT)]
    engines = Engines(session, [fake.url for fake in fakes], KEY)
    known = []
    for fake in reversed(fakes):
        await engines.states(PATIENCE_S)
        known.append(engines.context)
        fake.stop()
    states = await engines.states(0.5)
    assert [state.status for state in states] == ["unavailable", "unavailable"]
    assert [*known, engines.context] == [CONTEXT, 1024, 1024]


async def test_what_engines_compute_at_once_is_no_more_than_has_a_slot_of_its_own(
    session: aiohttp.ClientSession,
) -> None:
    """Whose recipe finds no slot waits inside the engine, where no turn and no patience counts."""
    told = [{"max_num_seqs": 32, "slots": 8}, {"max_num_seqs": 4, "slots": 8}, {"max_num_seqs": 5, "slots": None}]
    fakes = [FakeEngine(Knobs(figures=figures)).start() for figures in told]  # type: ignore[arg-type]
    engines = Engines(session, [fake.url for fake in fakes], KEY)
    await engines.states(PATIENCE_S)
    assert engines.sequences == 8 + 4 + 5
    for fake in fakes:
        fake.stop()


@pytest.mark.parametrize(("key", "told"), [(KEY, True), ("wrong", False)])
async def test_it_takes_a_drop_and_one_that_does_not_is_logged(
    subject: Subject, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, key: str, told: bool
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    await Engines(session, [nobody, subject.url], key).drop("a" * 26)
    warned = {url for url in (nobody, subject.url) if f"the engine at {url} did not drop an adapter" in caplog.text}
    assert warned == ({nobody} if told else {nobody, subject.url})
