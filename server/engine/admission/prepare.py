"""Check, register and lease the recipe of a request before vLLM admits the request.

An exception inside `execute_model` ends the engine. Every possible fault of a recipe is therefore found here, in the
API process, and answered with a 404 that the gateway understands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from jinja2 import TemplateError
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.lora.request import LoRARequest

from adapters.errors import FusionError, MtaError, excerpt
from adapters.recipe import is_recipe_name, parse_recipe
from adapters.training.example import Acts
from bank.items.prompt import opening
from bank.manifest import BankManifest
from server.engine import patches
from server.engine.admission.user_adapters import UserAdapters
from server.engine.shared_part import ALL, MAX_ID
from server.engine_protocol import SHARED
from server.observability.logs import traceparent
from server.observability.tracing import Tracing

Manifests = Mapping[str, BankManifest]  # by the 8 hex digits in recipe names; two while a fleet moves to a new bank

_held: ContextVar[ExitStack] = ContextVar("mta_held_names")  # releases the leases of the current HTTP request


@dataclass(eq=False)
class AdapterNames:
    """Bounded map from recipe names to engine ids, least recently used first; ids in use never change.

    vLLM compares adapters by name but tracks them by id, so one name under two ids in one batch is fatal. A name keeps
    its id while it is leased (an open HTTP request uses it) or `in_flight` (the engine holds such a request).
    """

    entries: dict[str, LoRARequest]  # vLLM reads it, only this class writes it
    capacity: int  # maximum number of entries, unless more are in use
    in_flight: Callable[[], Set[str]]
    next_id: int = 1
    shared: int = 0  # number of leases granted while another open request held the same name
    _leases: Counter[str] = field(default_factory=Counter)
    _ids: set[int] = field(default_factory=set)
    _reserved: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def leased(self) -> int:
        return len(self._leases)

    @property
    def in_use(self) -> Set[str]:
        return self.in_flight() | self._leases.keys() | self._reserved

    def reserve(self, entry: LoRARequest) -> None:
        """Give a name its entry for good."""
        self.entries[entry.lora_name] = entry
        self._ids.add(entry.lora_int_id)
        self._reserved.add(entry.lora_name)

    def lease(self, name: str) -> LoRARequest:
        """Return the entry of a name and keep it until `release`; call `release` once per lease."""
        entry = self.entries.pop(name, None) or self._make(name)
        self.entries[name] = entry  # now the most recently used
        self.shared += name in self._leases
        self._leases[name] += 1
        if len(self.entries) > self.capacity:  # `in_use` visits all requests, so names are dropped in batches
            held = self.in_use
            surplus = len(self.entries) - self.capacity + self.capacity // 8
            for idle in [known for known in self.entries if known not in held][:surplus]:
                self._ids.discard(self.entries.pop(idle).lora_int_id)
        return entry

    def release(self, name: str) -> None:
        self._leases[name] -= 1
        if self._leases[name] <= 0:
            del self._leases[name]

    def _make(self, name: str) -> LoRARequest:
        while self.next_id in self._ids:
            self.next_id = self.next_id % MAX_ID + 1
        new = self.next_id
        self._ids.add(new)
        self.next_id = new % MAX_ID + 1
        # vLLM keys its prefix cache by name and path; with the name as path, cache hits are always correct.
        return LoRARequest(lora_name=name, lora_int_id=new, lora_path=name)


@dataclass(frozen=True, slots=True)
class Preparer:
    manifests: Manifests
    names: AdapterNames
    users: UserAdapters
    timed_check: Callable[[], AbstractContextManager[None]]  # times the check and lease of a recipe
    tracing: Tracing
    tokenizer: Any

    async def prepare(self, name: str) -> BankManifest:
        """Check a recipe, lease its name for the rest of the current HTTP request, and load its user adapter.

        Return its bank's manifest. Raise MtaError if the name is not canonical, no bank can fuse the recipe, or the
        user adapter is unusable.
        """
        with self.timed_check():
            recipe = parse_recipe(name)
            if (manifest := self.manifests.get(recipe.bank)) is None:
                banks = sorted(self.manifests)
                raise FusionError(f"recipe {excerpt(name)} is for bank {recipe.bank}; this engine has {banks}")
            manifest.check(recipe)
            self.names.lease(name)
            _held.get().callback(self.names.release, name)
        if recipe.user_adapter is not None:
            await self.users.ensure(recipe)
        return manifest

    def count_shared(self, request: Any, manifest: BankManifest) -> None:
        """Write into a request how many of its prompt's first tokens are shared; of token ids it may say so itself."""
        given, messages = request.vllm_xargs or {}, getattr(request, "messages", None)
        count = 0 if messages else int(given.get(SHARED, 0))
        if messages and manifest.acts is Acts.ANSWER:
            count = ALL
        elif messages:
            options: dict[str, Any] = dict(request.chat_template_kwargs or {})
            if request.tools:
                options["tools"] = [tool.model_dump() for tool in request.tools]
            with suppress(ValueError, TypeError, KeyError, TemplateError):  # vLLM refuses such a conversation itself
                count = len(opening(self.tokenizer, messages, **options))
        request.vllm_xargs = {**given, SHARED: count}

    def install(self) -> None:
        """Make vLLM's serving classes prepare recipe names when they check that a model exists."""

        def preparing(vllm_check: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
            async def check_model(serving: Any, request: Any) -> Any:
                if is_recipe_name(request.model):
                    try:
                        with self.tracing.span("prepare", follows=traceparent.get()):
                            manifest = await self.prepare(request.model)
                    except MtaError as error:
                        kind, status = "NotFoundError", HTTPStatus.NOT_FOUND
                        return serving.create_error_response(str(error), kind, status, param="model")
                    if manifest.shares_prompts and hasattr(request, "vllm_xargs"):
                        self.count_shared(request, manifest)
                return await vllm_check(serving, request)

            return check_model

        patches.replace(patches.MODEL_CHECK, preparing)


@dataclass(frozen=True)
class HoldNames:
    """ASGI middleware that releases the names leased by an HTTP request when the response has ended."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as held:
            _held.set(held)  # of the task that serves this request alone
            await self.app(scope, receive, send)
