"""A stand-in for vLLM with our plugin: the same HTTP, no model, and knobs for what a real one does only by accident.

Different recipes and prompts get different texts. `tests/contract/test_engine.py` holds both to the same behaviour.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, pairwise
from types import SimpleNamespace
from typing import Any

from aiohttp import web

from adapters.errors import RecipeError
from adapters.recipe import FusionMethod, parse_recipe
from bench.rig.engine import KEY
from server.engine.phrases.arguments import phrases_of
from server.supervisor.services import free_port

__all__ = ["KEY", "FakeEngine", "Knobs", "Seen"]

WORDS = ("sea", "board", "rose", "queen", "rye", "steam", "plan", "salt", "wave", "knight", "crumb", "rail")
COMPLETION_TOKENS = 16  # longest continuation of a prompt, unless the request says otherwise


@dataclass(slots=True)
class Knobs:
    banks: tuple[str, ...] = ()  # fingerprints of the banks that it serves, of six anchors and a shared A each
    context: int = 512  # tokens that prompt and answer may have together; a token is a character of the prompt
    admit_s: float = 0.0  # pause before it answers at all
    token_delay_s: float = 0.0  # pause before each token
    hold_after: int | None = None  # say no more after so many tokens, until it is turned
    die_after: int | None = None  # cut the connection after so many tokens
    dies: int = 0  # cut the connection before the first token of so many more generations
    fail_after: int | None = None  # send an error event after so many tokens
    garbage: bytes | None = None  # send this instead of a chunk
    finish_reasons: tuple[str, ...] = ("length",)  # how its choices end, in turns over them
    lacks: Callable[[str], bool] = lambda model: False  # models that are answered with 404
    status: int | None = None  # of every answer, instead of generating
    user_adapters: bool = False  # whether it has whatever user adapter it is asked for
    counts: bool = True  # whether it says how many tokens a conversation has
    says: Mapping[str, Any] | None = None  # a whole message, perhaps with calls of tools, instead of words
    strict: bool = False  # whether it has the chat template of `bench.rig.tiny`, instead of one that takes everything
    sampling: Mapping[str, float] | None = field(default_factory=dict)  # its default; None: older than that
    figures: Mapping[str, int | None] = field(default_factory=dict)  # what its status says besides


@dataclass(slots=True)
class Seen:
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    aborted: bool = False  # whether its client left before its end
    ended: bool = False
    tokens: int = 0

    @property
    def prompts(self) -> list[Any]:
        """What is to be answered: the contents of a conversation, or each prompt, as a text or as token ids."""
        if "messages" in self.body:
            return [[message.get("content") or "" for message in self.body["messages"]]]
        prompt = self.body["prompt"]
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    def prompt_tokens_of(self, prompt: Any) -> int:
        return sum(map(len, prompt)) if "messages" in self.body else len(prompt)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(self.prompt_tokens_of, self.prompts))

    @property
    def returns_ids(self) -> bool:
        return bool(self.body.get("return_token_ids"))

    @property
    def prompt_ids(self) -> list[int] | None:
        return list(range(self.prompt_tokens)) if self.returns_ids else None

    @property
    def choices(self) -> range:
        return range(len(self.prompts) * self.body.get("n", 1))

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, self.tokens * len(self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def usage_of(self, answer: int) -> dict[str, int]:
        """What vLLM's chunks say of one answer and its prompt."""
        prompt, completion = self.prompt_tokens_of(self.prompts[answer // self.body.get("n", 1)]), self.tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def words(self, context: int) -> list[str]:
        """The answer, cut to what the context leaves, as vLLM cuts it: without a word."""
        left = context - self.prompt_tokens
        most = COMPLETION_TOKENS if "prompt" in self.body else left
        most = self.body.get("max_completion_tokens", self.body.get("max_tokens", most))
        said = self.prompts[-1] if "prompt" in self.body else self.body["messages"][-1].get("content")
        digest = hashlib.sha256(f"{self.body['model']}\0{said}".encode()).digest()
        return [f"{WORDS[digest[i % 32] % len(WORDS)]} " for i in range(min(most, left))]


@dataclass(slots=True)
class FakeEngine:
    knobs: Knobs = field(default_factory=Knobs)  # turn them at any time
    seen: list[Seen] = field(default_factory=list)  # generation requests
    looks: int = 0  # how often its status was asked for
    dropped: list[str] = field(default_factory=list)  # the users whose adapters it was told to let go of
    tokenized: list[list[dict[str, str]]] = field(default_factory=list)  # conversations that it was asked to count
    tokenizing: list[int] = field(default_factory=list)  # how many at once, whenever one more came
    port: int = field(default_factory=free_port)  # the same after a restart
    _stop: Callable[[], object] = lambda: None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> FakeEngine:
        listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listening)), daemon=True)
        self._thread.start()
        assert listening.wait(10), "the fake engine did not start"
        return self

    def stop(self) -> None:
        """Cut every connection and stop listening, as a killed process would."""
        if self._thread:
            self._stop()
            self._thread.join(10)
            self._thread = None

    def reset(self) -> None:
        """All knobs but the banks back at rest, nothing seen."""
        self.knobs = Knobs(self.knobs.banks)
        for noted in (self.seen, self.dropped, self.tokenized, self.tokenizing):
            noted.clear()

    def turn(self, **knobs: Any) -> None:
        self.knobs = replace(self.knobs, **knobs)

    async def _serve(self, listening: threading.Event) -> None:
        app = web.Application(client_max_size=64 << 20)
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._generate)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/mta/v1/status", self._status)
        app.router.add_post("/mta/v1/drop", self._drop)
        app.router.add_get("/health", self._health)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        self._stop = lambda: loop.call_soon_threadsafe(stopped.set)
        listening.set()
        await stopped.wait()
        for connection in runner.server.connections if runner.server else ():
            if connection.transport:
                connection.transport.abort()
        await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.knobs.status or 200)

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.tokenizing.append(len(self.tokenizing) + 1 - len(self.tokenized))
        await asyncio.sleep(self.knobs.admit_s)
        body = json.loads(await request.read())
        self.tokenized.append(body["messages"])
        if not self.knobs.counts:
            return error_answer(500, "the fake engine was told not to count")
        if self.knobs.strict and (reason := template_refusal(body["messages"])):
            return error_answer(400, reason)
        return web.json_response({"count": Seen(body).prompt_tokens})

    async def _status(self, request: web.Request) -> web.Response:
        self.looks += 1
        if not authorised(request):
            return error_answer(401, "missing or wrong engine key")
        told = {"status": "ok", "model": "fake", "max_model_len": self.knobs.context, "banks": list(self.knobs.banks)}
        told |= {} if self.knobs.sampling is None else {"sampling": dict(self.knobs.sampling)}
        return web.json_response(told | {"max_lora_rank": 8, "slots": 8, "names": 0} | dict(self.knobs.figures))

    async def _drop(self, request: web.Request) -> web.Response:
        if not authorised(request):
            return error_answer(401, "missing or wrong engine key")
        self.dropped.append(json.loads(await request.read())["user_key"])
        return web.json_response({"held": 0})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not authorised(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = json.loads(await request.read())
        seen = Seen(body, dict(request.headers))
        self.seen.append(seen)
        refusal = self._refusal(seen)
        try:
            await asyncio.sleep(self.knobs.admit_s)
            answer = refusal or await (self._stream if body.get("stream") else self._whole)(request, seen)
        except (asyncio.CancelledError, ConnectionError):
            seen.aborted = True
            raise
        seen.ended = True
        return answer

    def _refusal(self, seen: Seen) -> web.Response | None:
        knobs, body, model = self.knobs, seen.body, seen.body["model"]
        if knobs.status:
            return error_answer(knobs.status, f"the fake engine was told to fail at `{model}`")
        if knobs.lacks(model) or not (model == "base" or self._can_fuse(model)):
            return error_answer(404, f"The model `{model}` does not exist.", "model")
        if reason := (knobs.strict and template_refusal(body.get("messages", []))) or (
            knobs.says is None and options_refusal(body)
        ):
            return error_answer(400, reason)
        if (longest := body.get("max_tokens") or 0) > knobs.context:
            return error_answer(400, f"max_tokens={longest} cannot be greater than {knobs.context=}.", "max_tokens")
        if (prompt := seen.prompt_tokens) > knobs.context:
            limit = f"This model's maximum context length is {knobs.context} tokens."
            return error_answer(400, f"{limit} However, your prompt contains {prompt} input tokens.", "input_tokens")
        return None

    def _can_fuse(self, name: str) -> bool:
        try:
            recipe = parse_recipe(name)
        except RecipeError:
            return False
        known = all(term.anchor < 6 for term in recipe.terms) and recipe.bank in {bank[:8] for bank in self.knobs.banks}
        known = known and (self.knobs.user_adapters or recipe.user_adapter is None)
        return known and recipe.method is FusionMethod.SHARED

    async def _whole(self, request: web.Request, seen: Seen) -> web.Response:
        if self.knobs.says:
            return web.json_response(said_whole(seen, self.knobs.says))
        words = seen.words(self.knobs.context)
        for _ in words:
            if seen.tokens == self.knobs.die_after:
                _cut(request)
            if seen.tokens == self.knobs.fail_after:
                return error_answer(500, "EngineCore died")
            while seen.tokens == self.knobs.hold_after:
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.knobs.token_delay_s)
            seen.tokens += 1
        if self.knobs.garbage:
            return web.Response(body=self.knobs.garbage, content_type="application/json")
        return web.json_response(whole(seen, words, self.knobs.finish_reasons))

    async def _stream(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.knobs.dies:
            self.knobs.dies -= 1
            _cut(request)
        if self.knobs.says:
            await response.write(said_in_chunks(seen, self.knobs.says))
            return response
        for word in seen.words(self.knobs.context):
            if seen.tokens == self.knobs.die_after:
                _cut(request)
            if seen.tokens == self.knobs.fail_after:
                failure = {"error": {"message": f"EngineCore died at `{seen.body['model']}`", "code": 500}}
                await response.write(b"data: " + json.dumps(failure).encode() + b"\n\ndata: [DONE]\n\n")
                return response
            while seen.tokens == self.knobs.hold_after:
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.knobs.token_delay_s)
            if not seen.tokens and "messages" in seen.body:  # vLLM opens a message with its first token
                await response.write(chunks(seen, ""))
            seen.tokens += 1
            await response.write(self.knobs.garbage or chunks(seen, word))
        await response.write(chunks(seen, None, self.knobs.finish_reasons))
        await response.write(chunk(seen, None) + b"data: [DONE]\n\n")
        return response


def _cut(request: web.Request) -> None:
    assert request.transport
    request.transport.abort()


def authorised(request: web.Request) -> bool:
    return request.headers.get("Authorization") == f"Bearer {KEY}"


def error_answer(status: int, message: str, param: str | None = None) -> web.Response:
    error = {"message": message, "type": "Error", "param": param, "code": status}
    return web.json_response({"error": error}, status=status)


def template_refusal(messages: list[dict[str, str]]) -> str | None:
    """What the chat template of `bench.rig.tiny` raises."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        return "the system message must come first"
    twice = next((role for role, following in pairwise(roles) if role == following), None)
    return f"after {twice} comes another role" if twice else None


def options_refusal(body: dict[str, Any]) -> str | None:
    """What vLLM says of options that do not go together, or with how it was started."""
    if body.get("tool_choice", "auto" if "tools" in body else "none") == "auto":
        return '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    if body.get("n", 1) > 1 and body.get("temperature") == 0:
        return "n must be 1 when using greedy sampling"
    asking: Any = SimpleNamespace(extra_args=body.get("vllm_xargs"))
    try:
        phrases_of(asking)
    except ValueError as error:  # as of our logits processor
        return str(error)
    return None


def ids_of(text: str) -> list[int]:
    """The tokens of an answer, one a word."""
    return [WORDS.index(word) for word in text.split()]


def whole(seen: Seen, words: list[str], finish_reasons: Sequence[str]) -> dict[str, Any]:
    text = "".join(words)
    said = {"text": text} if "prompt" in seen.body else {"message": {"role": "assistant", "content": text}}
    said |= {"token_ids": ids_of(text) if seen.returns_ids else None}
    choices = [
        {"index": index, **said, "logprobs": _logprobs(seen.body, words), "finish_reason": reason}
        for index, reason in zip(seen.choices, cycle(finish_reasons), strict=False)
    ]
    more = {"usage": seen.usage, "kv_transfer_params": {"host": "inner"}, "prompt_token_ids": seen.prompt_ids}
    return _named(seen, "chat.completion") | {"choices": choices} | more


def said_whole(seen: Seen, says: Mapping[str, Any]) -> dict[str, Any]:
    reason = "tool_calls" if "tool_calls" in says else "stop"
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **says}, "finish_reason": reason}
    return _named(seen, "chat.completion") | {"choices": [choice], "usage": seen.usage}


def said_in_chunks(seen: Seen, says: Mapping[str, Any]) -> bytes:
    """A message in pieces of two characters, the calls of tools one after the other."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{name: piece} for name in ("reasoning", "content") for piece in _pieces(says.get(name) or "")]
    for index, call in enumerate(says.get("tool_calls", ())):
        opening = call | {"index": index, "function": call["function"] | {"arguments": ""}}
        deltas.append({"tool_calls": [opening]})
        arguments = [{"arguments": piece} for piece in _pieces(call["function"]["arguments"])]
        deltas += [{"tool_calls": [{"index": index, "function": function}]} for function in arguments]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls" if "tool_calls" in says else "stop"})
    values = [_named(seen, "chat.completion.chunk") | {"choices": [one], "usage": seen.usage} for one in choices]
    return b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values) + b"data: [DONE]\n\n"


def _pieces(text: str) -> list[str]:
    return [text[start : start + 2] for start in range(0, len(text), 2)]


def chunks(seen: Seen, word: str | None, finish_reasons: Sequence[str | None] = (None,)) -> bytes:
    """A chunk for each choice: its opening if `word` is empty, its end if it is None."""
    ends = zip(seen.choices, cycle(finish_reasons), strict=False)
    return b"".join(chunk(seen, index, word, reason) for index, reason in ends)


def chunk(seen: Seen, index: int | None, word: str | None = None, reason: str | None = None) -> bytes:
    """One choice's; without one what follows the last choice."""
    delta = ({} if word is None else {"content": word}) | ({"role": "assistant"} if word == "" else {})
    said = {"delta": delta} if "messages" in seen.body else {"text": word or ""}
    logprobs = _logprobs(seen.body, [word]) if word else None
    choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
    if word != "":  # vLLM's opening has the prompt's alone
        choice["token_ids"] = ids_of(word or "") if seen.returns_ids else None
    told = (
        {"choices": [], "usage": seen.usage} if index is None else {"choices": [choice], "usage": seen.usage_of(index)}
    )
    told |= {"prompt_token_ids": seen.prompt_ids} if word == "" else {}
    content = _named(seen, "chat.completion.chunk") | told
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _named(seen: Seen, kind: str) -> dict[str, Any]:
    name, kind = f"chatcmpl-{seen.headers.get('X-Request-ID')}", "text_completion" if "prompt" in seen.body else kind
    return {"id": name, "object": kind, "created": 1790000000, "model": seen.body["model"]}


def _logprobs(body: dict[str, Any], words: list[str]) -> dict[str, Any] | None:
    if not body.get("logprobs"):
        return None
    if "prompt" in body:
        return {"tokens": words, "token_logprobs": [-0.5] * len(words), "top_logprobs": [], "text_offset": []}
    return {"content": [{"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": []} for word in words]}
