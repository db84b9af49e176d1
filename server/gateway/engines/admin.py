"""Direct calls to the engines, bypassing any router: status, adapter drops and tokenisation."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

import aiohttp
import orjson

from adapters.errors import MtaError
from server.engine_protocol import BASE_MODEL, DROP, STATUS, key_header
from server.errors import Unavailable

log = logging.getLogger("mta.gateway")

ROUTER_READY_PATH = "/readiness"  # answers 200 if any engine is ready; some routers lack this path
ROUTER_HEALTH_PATH = "/health"  # answers 200 only if all engines are healthy
DROP_TIMEOUT_S = 5.0
TOKENIZE_TIMEOUT_S = 5.0  # for one conversation, which takes the engine milliseconds
TOKENIZE_ATTEMPTS = 2  # maximum number of engines to ask


class EngineFault(MtaError):
    """A call to an address failed; `status` is `unavailable`, `wrong_key` or `not_an_mta_engine`."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True, slots=True)
class AddressState:
    """State of the address that serves generations: an engine or a router."""

    url: str
    status: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class EngineState(AddressState):
    """State that one engine reports; `status` is `ok`, `expected` until its first report, or the kind of fault."""

    max_model_len: int | None = None
    banks: tuple[str, ...] = ()
    sampling: Mapping[str, Any] | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)  # of its model, by part; older engines do not tell


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Adapter and batch figures of one engine; None if the engine does not report them."""

    slots: int | None = None  # maximum number of adapters in one batch
    slots_taken: int | None = None
    prepares: int | None = None  # number of requests for which the engine prepared an adapter
    fuses: int | None = None  # number of those requests that waited for a fuse
    max_num_seqs: int | None = None  # maximum number of sequences in one batch

    @property
    def sequences(self) -> int:
        """Number of sequences computed at once even if every recipe differs; 0 if unknown."""
        batch = self.max_num_seqs or 0
        return min(batch, self.slots or batch)


class Engines:
    """All engines of the gateway, with the state that they last reported."""

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str], key: str | None) -> None:
        self._session = session
        self._headers = key_header(key)
        self.urls = tuple(urls)
        self.answering: tuple[str, ...] = ()  # URLs of the engines with status `ok` at the last probe
        self._seen: set[str] = set()  # URLs of the engines that have reported once
        self.context: int | None = None  # shortest context length last reported, in tokens
        self.sampling: Mapping[str, Any] = {}  # last reported, of requests that set none; the first engine's that does
        self.sequences: int | None = None  # total of `EngineFigures.sequences`; None if unknown
        self.figures: list[EngineFigures | None] = [None] * len(self.urls)

    async def probe(self, timeout_s: float) -> tuple[EngineState, ...]:
        """Probe every engine, update the attributes and return the states in the order of `urls`."""
        reports = await asyncio.gather(*(self._probe_engine(url, timeout_s) for url in self.urls))
        states = tuple(state for state, _ in reports)
        self.figures = [figures for _, figures in reports]
        self.answering = tuple(state.url for state in states if state.status == "ok")
        contexts = [state.max_model_len for state in states if state.max_model_len]
        self.context = min(contexts, default=self.context)
        self.sampling = next((state.sampling for state in states if state.sampling is not None), self.sampling)
        self.sequences = sum(figures.sequences for figures in self.figures if figures) or self.sequences
        return states

    async def probe_router(self, url: str, timeout_s: float) -> AddressState:
        try:
            for path in (ROUTER_READY_PATH, ROUTER_HEALTH_PATH):
                http_status, _ = await self._request("GET", url + path, timeout_s)
                if http_status != 404:
                    break
        except EngineFault as fault:
            return AddressState(url, fault.status, str(fault))
        if http_status != 200:
            return AddressState(url, "unavailable", f"it answered {http_status} to {path}")
        return AddressState(url, "ok")

    def by_preference(self, key: str) -> tuple[str, ...]:
        """Return the engine URLs in the order to try them for `key`; the order is stable for each key.

        Engines that failed the last probe come last, because they may have recovered.
        """
        order = {url: blake2b(f"{url} {key}".encode(), digest_size=8).digest() for url in self.urls}
        return tuple(sorted(self.urls, key=lambda url: (url not in self.answering, order[url])))

    async def drop(self, user_key: str) -> None:
        """Tell every engine to drop a user's adapters; log failures."""

        async def drop_at(url: str) -> None:
            try:
                await self._call_private("POST", url, DROP, DROP_TIMEOUT_S, {"user_key": user_key})
            except EngineFault as fault:
                log.warning("the engine at %s did not drop an adapter: %s", url, fault)

        await asyncio.gather(*map(drop_at, self.urls))

    async def count_tokens(
        self, messages: list[dict[str, str]], template: Mapping[str, Any] | None = None
    ) -> int | None:
        """Return the length of a conversation in tokens; None if no engine answers in time.

        `template` has the chat template's arguments.
        """
        try:
            http_status, answer = await self._tokenize(messages, chat_template_kwargs=template)
            return int(answer["count"]) if http_status == 200 else None
        except (Unavailable, KeyError, TypeError, ValueError):
            return None

    async def template_refusal(self, messages: list[dict[str, str]]) -> str | None:
        """Return why the chat template rejects a conversation that ends with the answer; None if it accepts it."""
        http_status, answer = await self._tokenize(messages)
        if http_status == 200:
            return None
        if http_status != 400:
            raise Unavailable(f"the engine answered {http_status} to /tokenize", code="engine_unavailable")
        try:
            return str(answer["error"]["message"])
        except (KeyError, TypeError) as error:
            raise Unavailable("the engine refused the request without a reason", code="engine_unavailable") from error

    async def _request(self, method: str, url: str, timeout_s: float, body: object = None) -> tuple[int, bytes]:
        """Return HTTP status and body of a response; raise `EngineFault` if there is no response."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(method, url, json=body, headers=self._headers) as response,
            ):
                return response.status, await response.read()
        except TimeoutError as error:
            raise EngineFault("unavailable", f"no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineFault("unavailable", str(error)) from error

    async def _probe_engine(self, url: str, timeout_s: float) -> tuple[EngineState, EngineFigures | None]:
        try:
            answer = orjson.loads(await self._call_private("GET", url, STATUS, timeout_s))
            context = int(answer["max_model_len"])
            banks, prompts = tuple(map(str, answer["banks"])), dict(answer.get("prompts", {}))
            sampling = dict(answer["sampling"]) if "sampling" in answer else None
            reported = {field.name: answer.get(field.name) for field in fields(EngineFigures)}
            figures = EngineFigures(**{name: None if n is None else int(n) for name, n in reported.items()})
        except EngineFault as fault:
            if fault.status == "unavailable" and url not in self._seen:
                return EngineState(url, "expected", f"it has not answered yet: {fault}"), None
            return EngineState(url, fault.status, str(fault)), None
        except (ValueError, TypeError, KeyError) as error:
            return EngineState(url, "not_an_mta_engine", f"its status response is invalid: {error}"), None
        self._seen.add(url)
        return EngineState(url, "ok", None, context, banks, sampling, prompts), figures

    async def _call_private(self, method: str, url: str, route: str, timeout_s: float, body: object = None) -> bytes:
        """Return the response body of a private route; raise `EngineFault` if the HTTP status is not 200."""
        http_status, raw = await self._request(method, url + route, timeout_s, body)
        if http_status in (401, 403):
            raise EngineFault("wrong_key", "it refused the gateway's key: MTA_ENGINE_KEY differs")
        if http_status == 404:
            raise EngineFault("not_an_mta_engine", f"it has no {route}: the plugin is not loaded")
        if http_status != 200:
            raise EngineFault("unavailable", f"it answered {http_status}")
        return raw

    async def _tokenize(self, messages: list[dict[str, str]], **options: Any) -> tuple[int, Any]:
        """Return HTTP status and body of vLLM's `/tokenize` from any engine; if it fails, from another one."""
        body = {"model": BASE_MODEL, "messages": messages, "add_generation_prompt": False, **options}
        fault: Exception | None = None
        for url in self.by_preference(str(random.random()))[:TOKENIZE_ATTEMPTS]:
            try:
                http_status, raw = await self._request("POST", f"{url}/tokenize", TOKENIZE_TIMEOUT_S, body)
                return http_status, orjson.loads(raw)
            except (EngineFault, ValueError) as error:
                fault = error
        raise Unavailable("the engine cannot be reached now", code="engine_unavailable") from fault
