"""Evaluate through a running engine: losses from vLLM's `prompt_logprobs`, with the recipe's name as the model.

A trained user adapter is stored temporarily in the engine's store under a random user key.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from statistics import fmean
from typing import Any

import aiohttp
import orjson

from adapters.errors import MtaError, excerpt
from adapters.recipe import UserAdapterId
from adapters.training.example import Example
from adapters.user_adapter import encode_user_adapter
from bank.evaluation.scoring import TEMPERATURE, WRITTEN_TOKENS, EvalAdapter, Reading
from server.engine_protocol import BASE_MODEL, key_header
from server.gateway.engines.chat import open_session
from server.settings import Settings
from server.store.adapters import AdapterStore, StoredAdapter, new_adapter_id
from server.store.opening import open_stores
from server.store.tenants.user_key import UserKeys

LENT_S = 3600  # seconds until the store drops a trained adapter
SILENCE_S = 300.0  # timeout for a response without new data


@contextmanager
def open_engine_reader(url: str, settings: Settings) -> Iterator[EngineReader]:
    """Open a reader for the engine at this URL, which must not be a gateway's; key and store come from the settings."""
    key = next(iter(settings.engine_keys), None)
    opened = AsyncExitStack()

    async def begin() -> EngineReader:
        session = await opened.enter_async_context(open_session(SILENCE_S))
        stores = await opened.enter_async_context(open_stores(settings, checked=False))
        headers = {"Content-Type": "application/json"} | key_header(key)
        return EngineReader(f"{url.rstrip('/')}/v1/completions", headers, runner, session, stores.adapters)

    with asyncio.Runner() as runner:
        try:
            yield runner.run(begin())
        finally:
            runner.run(opened.aclose())


@dataclass(slots=True)
class EngineReader:
    """A `ModelReader` that uses a running engine; MtaError if it cannot be reached or does not serve the adapter."""

    _url: str
    _headers: Mapping[str, str]
    _runner: asyncio.Runner
    _session: aiohttp.ClientSession
    _adapters: AdapterStore
    _keys: UserKeys = field(default_factory=lambda: UserKeys(secrets.token_hex(32), "evaluation"))
    _lent: dict[str, str] = field(default_factory=dict)  # SHA-256 of an adapter's bytes → its model name

    def read(
        self, adapter: EvalAdapter | None, examples: Sequence[Example], new_tokens: int = 0, *, chances: bool = False
    ) -> list[Reading]:
        """Read losses and answers, but no `chances`: an engine does not report the probabilities of scores."""
        whole = [list(example.ids) for example in examples]
        read = self._complete_all(adapter, whole, max_tokens=1, temperature=0, prompt_logprobs=0)
        losses = [_loss(answer, example) for answer, example in zip(read, examples, strict=True)]
        if not new_tokens:
            return [Reading(loss, None) for loss in losses]
        answers = self._complete_all(adapter, _prompts(examples), max_tokens=new_tokens, temperature=0)
        texts = [answer["choices"][0]["text"].strip() for answer in answers]
        return [Reading(loss, text) for loss, text in zip(losses, texts, strict=True)]

    def write(self, adapter: EvalAdapter | None, examples: Sequence[Example], texts: int) -> list[list[str]]:
        sampling = {"max_tokens": WRITTEN_TOKENS, "temperature": TEMPERATURE, "n": texts, "seed": 0}
        answers = self._complete_all(adapter, _prompts(examples), **sampling)
        return [[choice["text"].strip() for choice in answer["choices"]] for answer in answers]

    def first_token_ms(self, adapter: EvalAdapter | None, example: Example) -> float:
        start_s = time.perf_counter()
        salt = secrets.token_hex(8)  # prevents hits in the prefix cache
        self._complete_all(adapter, _prompts([example]), max_tokens=1, temperature=0, cache_salt=salt)
        return (time.perf_counter() - start_s) * 1e3

    def _complete_all(
        self, adapter: EvalAdapter | None, prompts: Sequence[list[int]], **fields: Any
    ) -> list[dict[str, Any]]:
        async def complete() -> list[dict[str, Any]]:
            body = {"model": await self._name(adapter)} | fields
            return await asyncio.gather(*(self._complete(body | {"prompt": prompt}) for prompt in prompts))

        return self._runner.run(complete())

    async def _name(self, adapter: EvalAdapter | None) -> str:
        """Return an adapter's model name in the engine; store a trained adapter once, temporarily."""
        if adapter is None:
            return BASE_MODEL
        user = adapter.user_adapter
        if user is None:
            return adapter.recipe.name
        raw = encode_user_adapter(adapter.bank.manifest.layout, user)
        digest = hashlib.sha256(raw).hexdigest()
        if digest not in self._lent:
            lent = UserAdapterId(self._keys.key(digest), new_adapter_id())
            await self._adapters.put_temporary(lent.user_key, StoredAdapter(lent.id, user.recipe, digest, raw), LENT_S)
            self._lent[digest] = replace(adapter.recipe, user_adapter=lent).name
        return self._lent[digest]

    async def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self._session.post(self._url, data=orjson.dumps(body), headers=self._headers) as response:
                raw = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise MtaError(f"the engine at {self._url} cannot be reached: {error}") from error
        if response.status != HTTPStatus.OK:
            advice = "start it with this bank as MTA_BANK and, for `task`, BANK/baselines as MTA_NEXT_BANK"
            raise MtaError(f"the engine refused {body['model']} ({response.status}): {excerpt(raw, 300)}; {advice}")
        return dict(orjson.loads(raw))


def _prompts(examples: Sequence[Example]) -> list[list[int]]:
    return [list(example.ids[: example.loss_from]) for example in examples]


def _loss(answer: dict[str, Any], example: Example) -> float:
    """Return the mean loss of the example's output tokens; the first entry of `prompt_logprobs` is None."""
    entries = answer["choices"][0]["prompt_logprobs"]
    tokens = range(example.loss_from, len(example.ids))
    return -fmean(entries[place][str(example.ids[place])]["logprob"] for place in tokens)
