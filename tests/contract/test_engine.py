"""What every engine must do for the gateway, held against vLLM with our plugin and against the fake that tests use."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from adapters.errors import MtaError
from adapters.recipe import FusionMethod, FusionRecipe, Term, UserAdapterId
from bank.lookup.phrases import LONGEST, TrustedPhrases, phrase_table
from bank.manifest import read_manifest
from bench.rig.engine import KEY, Engine
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.valkey import free_port
from server.engine_protocol import key_header
from server.errors import EngineFailed, InvalidRequest, Unavailable
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import AdapterMissing, EngineClient, EngineRequest, open_session
from tests.support.fake_engine import FakeEngine, Knobs

CONTEXT = 512
SAMPLING = {"temperature": 0.7, "top_k": 50}  # of `tiny_engine`


@dataclass(frozen=True)
class Subject:
    url: str
    bank: Path  # folder of the bank that it serves
    generated: Callable[[], float]  # tokens so far
    idle: Callable[[], bool]  # whether it generates nothing now

    def recipe(self, **changes: Any) -> FusionRecipe:
        recipe = FusionRecipe(read_manifest(self.bank).short, FusionMethod.SHARED, True, (Term(0, 600), Term(3, 400)))
        return replace(recipe, **changes)


def client_of(session: aiohttp.ClientSession, url: str, key: str | None = KEY) -> EngineClient:
    """A client of an engine that stands alone."""
    return EngineClient(session, url, Engines(session, [url], KEY), key)


def ask(model: str, text: str = "hello there", *, max_tokens: int = 8, **sampling: Any) -> EngineRequest:
    sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **sampling}
    return EngineRequest("gen-0123", model, [{"role": "user", "content": text}], sampling, "prompt", "a salt")


async def answer(client: EngineClient, request: EngineRequest) -> str:
    async with client.generate(request) as stream:
        return "".join([text async for text, _ in stream])


async def refusal(client: EngineClient, request: EngineRequest, kind: type[MtaError]) -> Any:
    with pytest.raises(kind) as caught:
        await answer(client, request)
    return caught.value


@pytest.fixture(scope="module", params=["fake", "vllm"])
def subject(request: pytest.FixtureRequest, tiny_bank_folder: Path) -> Iterator[Subject]:
    if request.param == "fake":
        banks = (read_manifest(tiny_bank_folder).fingerprint,)
        fake = FakeEngine(Knobs(banks, token_delay_s=0.002, strict=True, sampling=SAMPLING)).start()
        yield Subject(
            fake.url,
            tiny_bank_folder,
            generated=lambda: sum(seen.tokens for seen in fake.seen),
            idle=lambda: all(seen.aborted or seen.ended for seen in fake.seen),
        )
        fake.stop()
        return
    engine: Engine = request.getfixturevalue("tiny_engine")
    yield Subject(
        engine.url,
        tiny_bank_folder,
        generated=lambda: engine.metric("vllm:generation_tokens_total"),
        idle=lambda: engine.metric("vllm:num_requests_running") == 0,
    )


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session(timeout_s=60) as opened:
        yield opened


@pytest.fixture
def client(subject: Subject, session: aiohttp.ClientSession) -> EngineClient:
    return client_of(session, subject.url)


@pytest.fixture
def engines(subject: Subject, session: aiohttp.ClientSession) -> Engines:
    return Engines(session, [subject.url], KEY)


async def test_whole_and_streamed_answers_agree_on_reason_and_usage(client: EngineClient, subject: Subject) -> None:
    tokens = 200  # vLLM joins what a busy client has not read yet
    request = ask(subject.recipe().name, max_tokens=tokens)
    async with client.generate(request) as stream:
        streamed = [text async for text, _ in stream if text]
    assert stream.first_token_s is not None and stream.first_token_s > stream.sent_s
    async with client.generate(replace(request, stream=False)) as whole:
        pieces = [text async for text, _ in whole if text]
    assert pieces == ["".join(streamed)] != streamed
    assert whole.first_token_s is None
    for made in (stream, whole):
        assert (made.finish_reason, made.complete) == ("length", True)
        prompt = made.prompt_tokens or 0
        assert (
            made.usage.items()
            >= {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}.items()
        )


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_are_continued_without_a_template(client: EngineClient, subject: Subject, stream: bool) -> None:
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
    assert answer.usage.items() >= {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 2 * 8}.items()


async def test_answers_repeat_and_differ_between_recipes(client: EngineClient, subject: Subject) -> None:
    one, other = subject.recipe().name, subject.recipe(terms=(Term(1, 1000),)).name
    first = await answer(client, ask(one, max_tokens=24))
    assert await answer(client, ask(one, max_tokens=24)) == first
    assert await answer(client, ask(other, max_tokens=24)) != first
    assert await answer(client, ask("base", max_tokens=24)) != first
    seeded = ask(one, temperature=0.9, top_p=0.5, seed=7, stop=["never said"])
    assert await answer(client, seeded) == await answer(client, seeded)


async def test_a_conversation_with_all_roles_is_taken(client: EngineClient, subject: Subject, engines: Engines) -> None:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": f"I am the {role} 🌊"} for role in roles]
    async with client.generate(replace(ask(subject.recipe().name), messages=messages)) as stream:
        async for _ in stream:
            pass
    assert stream.usage["completion_tokens"] == 8
    assert stream.usage["prompt_tokens"] > sum(len(message["content"]) for message in messages) - 1
    counted = await engines.count_tokens(messages)
    assert await engines.count_tokens(messages, {"thinking": True}) == counted
    messages[0]["content"] += "x" * 100
    assert await engines.count_tokens(messages) == (counted or 0) + 100


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("user", "system", "user"), "the system message must come first"),
        (("user", "user"), "after user comes another role"),
        (("system", "user", "assistant", "assistant", "user"), "after assistant comes another role"),
    ],
)
async def test_chat_template_refusal_is_an_invalid_request(
    client: EngineClient, subject: Subject, engines: Engines, roles: tuple[str, ...], reason: str
) -> None:
    messages = [{"role": role, "content": "hello"} for role in roles]
    request = replace(ask(subject.recipe().name), messages=messages, prompt_param="messages")
    error = await refusal(client, request, InvalidRequest)
    assert (error.param, error.code) == ("messages", "invalid_value")
    assert reason in error.message
    answered = {"role": "assistant", "content": "hi"}
    assert reason in str(await engines.template_refusal([*messages, answered]))
    assert await engines.template_refusal([messages[0], answered]) is None


@pytest.mark.parametrize(
    "model",
    [
        {"bank": "00000000"},
        {"terms": (Term(99, 1000),)},
        {"method": FusionMethod.CAT},
        {"user_adapter": UserAdapterId("a" * 26, "a" * 26)},
        *("nonsense", "mta3:00000000:shared:c+a03*0571", "../../etc"),
    ],
)
async def test_unservable_models_are_missing(
    client: EngineClient, subject: Subject, model: str | dict[str, Any]
) -> None:
    await refusal(client, ask(model if isinstance(model, str) else subject.recipe(**model).name), AdapterMissing)


@pytest.mark.parametrize("chars", [CONTEXT + 1, CONTEXT * 2, CONTEXT * 100])
async def test_a_prompt_beyond_the_context_is_refused(client: EngineClient, subject: Subject, chars: int) -> None:
    error = await refusal(client, ask(subject.recipe().name, "x" * chars), InvalidRequest)
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert str(CONTEXT) in error.message


@pytest.mark.parametrize("stream", [False, True])
async def test_the_ids_of_an_answer_come_back_with_its_phrases(
    client: EngineClient, subject: Subject, session: aiohttp.ClientSession, stream: bool
) -> None:
    request = ask(subject.recipe().name)
    body = {"model": request.model, "messages": request.messages, "return_token_ids": True, **request.sampling}
    async with session.post(f"{subject.url}/v1/chat/completions", json=body, headers=key_header(KEY)) as response:
        value = await response.json()
    (choice,) = value["choices"]
    ids = choice["token_ids"]
    assert (len(ids), len(value["prompt_token_ids"])) == (8, value["usage"]["prompt_tokens"])
    phrases = TrustedPhrases(phrase_table([ids[:4]] * 2), [0.0] * LONGEST)  # trusted so little, they move nothing
    moving = replace(request, phrases=phrases, stream=stream)
    async with client.generate(moving) as answer:
        text = "".join([text async for text, _ in answer])
    assert (text, answer.moved) == (choice["message"]["content"], 4)


@pytest.mark.parametrize(("table", "trust"), [(b"short", [0.5] * LONGEST), (bytes(11), [0.5] * LONGEST), (b"", [1.0])])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_table_that_is_none_is_refused(
    subject: Subject, client: EngineClient, table: bytes, trust: list[float], stream: bool
) -> None:
    sampling = {"vllm_xargs": {"mta_phrases": b64encode(table).decode(), "mta_trust": trust}}
    await refusal(client, replace(ask(subject.recipe().name, **sampling), stream=stream), InvalidRequest)


@pytest.mark.parametrize("prompt", [None, "x" * 400])
async def test_max_tokens_up_to_context_is_cut_to_the_room_left(
    client: EngineClient, subject: Subject, prompt: str | None
) -> None:
    request = replace(ask(subject.recipe().name, max_tokens=CONTEXT, text="x" * 400), prompt=prompt, stream=False)
    async with client.generate(request) as stream:
        async for _ in stream:
            pass
    assert (stream.finish_reason, stream.usage["total_tokens"]) == ("length", CONTEXT)
    longer = replace(request, sampling={**request.sampling, "max_tokens": CONTEXT + 1})
    assert (await refusal(client, longer, InvalidRequest)).param == "max_tokens"


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_length_comes_first_and_leaving_early_aborts(
    client: EngineClient, subject: Subject, stream: bool
) -> None:
    before = subject.generated()
    request = replace(ask(subject.recipe().name, max_tokens=CONTEXT - 40), stream=stream)
    if stream:
        async with client.generate(request) as begun:  # a random model's first readable text may be long in coming
            assert len("hello there") <= (begun.prompt_tokens or 0) < 40
    else:
        asking = asyncio.create_task(answer(client, request))
        await asyncio.to_thread(wait_until, lambda: not subject.idle(), "the engine to begin")
        asking.cancel()
    await asyncio.to_thread(wait_until, subject.idle, "the engine to stop")
    assert stream <= subject.generated() - before < CONTEXT - 40


async def test_connections_are_kept(client: EngineClient, session: aiohttp.ClientSession) -> None:
    made: list[Any] = []

    async def note(*_: Any) -> None:
        made.append(None)

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(note)
    trace.freeze()
    session.trace_configs.append(trace)
    for _ in range(5):
        await answer(client, ask("base", max_tokens=2))
    assert len(made) <= 1


async def test_nobody_there_is_unavailable(session: aiohttp.ClientSession) -> None:
    nowhere, messages = f"http://127.0.0.1:{free_port()}", [{"role": "user", "content": "hello"}]
    await refusal(client_of(session, nowhere), ask("base"), Unavailable)
    silent = Engines(session, [nowhere], KEY)
    with pytest.raises(Unavailable):
        await silent.template_refusal(messages)
    assert await silent.count_tokens(messages) is None


async def test_probe_reads_status_and_reports_a_wrong_key(subject: Subject, session: aiohttp.ClientSession) -> None:
    for wrong in ("wrong", None):
        error = await refusal(client_of(session, subject.url, wrong), ask("base"), EngineFailed)
        assert error.code == "engine_key"
    for key, status, banks, context in (
        (KEY, "ok", (read_manifest(subject.bank).fingerprint,), CONTEXT),
        ("wrong", "wrong_key", (), None),
    ):
        engines = Engines(session, [subject.url], key)
        (state,) = await engines.probe(PATIENCE_S)
        assert (state.status, state.banks, engines.context) == (status, banks, context)
        assert engines.sampling == (SAMPLING if context else {})


async def test_engine_limits_stay_known_while_engines_are_away(session: aiohttp.ClientSession) -> None:
    """Whose recipe finds no slot waits inside the engine, where no turn and no patience counts."""
    told = [(3, 32, 8), (2, 4, 8), (1, 5, None)]
    fakes = [
        FakeEngine(Knobs(context=times * CONTEXT, figures={"max_num_seqs": batch, "slots": slots})).start()
        for times, batch, slots in told
    ]
    engines = Engines(session, [fake.url for fake in fakes], KEY)
    await engines.probe(PATIENCE_S)
    assert engines.sequences == 8 + 4 + 5
    known = [engines.context]
    for fake in reversed(fakes):
        fake.stop()
        states = await engines.probe(0.5)
        known.append(engines.context)
    assert [state.status for state in states] == ["unavailable"] * 3
    assert known == [CONTEXT, 2 * CONTEXT, 3 * CONTEXT, 3 * CONTEXT]


@pytest.mark.parametrize(("key", "told"), [(KEY, True), ("wrong", False)])
async def test_it_takes_a_drop_and_one_that_does_not_is_logged(
    subject: Subject, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, key: str, told: bool
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    await Engines(session, [nobody, subject.url], key).drop("a" * 26)
    warned = {url for url in (nobody, subject.url) if f"the engine at {url} did not drop an adapter" in caplog.text}
    assert warned == ({nobody} if told else {nobody, subject.url})
