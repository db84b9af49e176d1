"""Prepare before admission: a recipe is checked, named and held before vLLM sees the request that asks for it.

An exception inside `execute_model` ends the engine: so whatever could be wrong with a recipe is found here, in the API
process, and answered with a 404 that the gateway understands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Set
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from prometheus_client import Histogram
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.lora.request import LoRARequest

from adapters.errors import FusionError, MtaError, excerpt
from adapters.recipe import FusionRecipe, is_recipe_name, parse_recipe
from bank.manifest import BankManifest
from server.engine import patches
from server.engine.admission.user_adapters import UserAdapters
from server.engine.fusing.figures import timed
from server.watching.logs import traceparent
from server.watching.tracing import Tracing

MAX_ID = 2**31 - 1  # vLLM's kernels index adapters by int32

Manifests = Mapping[str, BankManifest]
"""An engine's banks by the 8 hex digits that recipes carry: two while a fleet moves from one to the next."""

_held: ContextVar[ExitStack] = ContextVar("mta_held_names")  # releases the names that the current HTTP request holds


@dataclass(eq=False)
class AdapterNames:
    """The engine ids of recipes, least recently used first: bounded, and unchanged while anything may ask for them.

    vLLM compares adapters by name but tracks them by id, so one name under two ids in one batch is fatal. A name keeps
    its id while it is leased (an open HTTP request named it) or `in_flight` (the engine holds such a request);
    `capacity` counts the others. vLLM looks names up in `entries`, which nothing else writes.
    """

    entries: dict[str, LoRARequest]
    capacity: int
    in_flight: Callable[[], Set[str]]
    next_id: int = 1
    shared: int = 0  # leases of a name that another open request held already
    _leases: Counter[str] = field(default_factory=Counter)
    _ids: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def leased(self) -> int:
        return len(self._leases)

    @property
    def in_use(self) -> Set[str]:
        return self.in_flight() | self._leases.keys()

    def lease(self, name: str) -> LoRARequest:
        """Return the entry of a name and keep it until `release`; release each lease once."""
        entry = self.entries.pop(name, None) or self._make(name)
        self.entries[name] = entry  # now the most recently used
        self.shared += name in self._leases
        self._leases[name] += 1
        if len(self.entries) > self.capacity:
            self._evict()
        return entry

    def release(self, name: str) -> None:
        self._leases[name] -= 1
        if self._leases[name] <= 0:
            del self._leases[name]

    def _evict(self) -> None:
        """Drop the least recently used names that nobody holds, an eighth of the capacity at a time.

        Finding what is in flight costs a pass over the engine's requests; evicting in batches makes that rare.
        """
        held = self.in_use
        surplus = len(self.entries) - self.capacity + self.capacity // 8
        for name in [name for name in self.entries if name not in held][:surplus]:
            self._ids.discard(self.entries.pop(name).lora_int_id)

    def _make(self, name: str) -> LoRARequest:
        """Under the next free id; after MAX_ID they start over at 1."""
        while self.next_id in self._ids:
            self.next_id = self.next_id % MAX_ID + 1
        new = self.next_id
        self._ids.add(new)
        self.next_id = new % MAX_ID + 1
        # vLLM's prefix cache is keyed by name and path: with the name as path the cache is always right.
        return LoRARequest(lora_name=name, lora_int_id=new, lora_path=name)


@dataclass(frozen=True, slots=True)
class Preparer:
    manifests: Manifests
    names: AdapterNames
    users: UserAdapters
    check: Histogram  # gets how long checking and naming a recipe takes, without its user adapter
    tracing: Tracing

    async def prepare(self, name: str) -> None:
        """Check a recipe, hold its name for the rest of the current HTTP request, and load its user adapter.

        MtaError: the name is not canonical, no bank of this engine can fuse it, or its user adapter is at fault.
        """
        held = _held.get()
        with timed(self.check):
            recipe = self._checked(name)
            self.names.lease(name)
            held.callback(self.names.release, name)
        if recipe.user_adapter is not None:
            await self.users.ensure(recipe)

    def _checked(self, name: str) -> FusionRecipe:
        """A recipe whose fusion cannot fail, apart from its user adapter."""
        recipe = parse_recipe(name)
        manifest = self.manifests.get(recipe.bank)
        if manifest is None:
            raise FusionError(
                f"recipe {excerpt(name)} is for bank {recipe.bank}; this engine has {sorted(self.manifests)}"
            )
        manifest.check(recipe)
        return recipe

    def install(self) -> None:
        """Make vLLM's serving classes prepare recipe names where they check that a model exists."""

        def preparing(vllm_check: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
            async def check_model(serving: Any, request: Any) -> Any:
                if is_recipe_name(request.model):
                    try:
                        with self.tracing.span("prepare", follows=traceparent.get()):
                            await self.prepare(request.model)
                    except MtaError as error:
                        return serving.create_error_response(
                            message=str(error),
                            err_type="NotFoundError",
                            status_code=HTTPStatus.NOT_FOUND,
                            param="model",
                        )
                return await vllm_check(serving, request)

            return check_model

        patches.replace(patches.MODEL_CHECK, preparing)


@dataclass(frozen=True)
class HoldNames:
    """ASGI middleware: names prepared during an HTTP request are released when it has ended, streams included."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as held:
            token = _held.set(held)
            try:
                await self.app(scope, receive, send)
            finally:
                _held.reset(token)
