"""Prepare before admission: a recipe is checked, named and held before vLLM sees the request that asks for it.

Nothing may fail inside `execute_model`: an exception there ends the engine. So everything that could be wrong with a
recipe is found here, in the API process, and answered with a 404 that the gateway understands.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from prometheus_client import Histogram
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.lora.request import LoRARequest

from adapters.errors import MtaError
from adapters.recipe import is_recipe_name
from server.engine import patches
from server.engine.admission.names import AdapterNames
from server.engine.admission.user_adapters import UserAdapters
from server.engine.banks import Manifests, checked_recipe
from server.engine.fusing.figures import timed
from server.watching.logs import traceparent
from server.watching.tracing import Tracing

_held: ContextVar[list[str] | None] = ContextVar("mta_held_names", default=None)
"""The names the current HTTP request holds; None outside of one."""


class Preparer:
    """Admits recipes; `check` gets how long checking and naming one takes, without its user adapter."""

    def __init__(
        self,
        manifests: Manifests,
        names: AdapterNames[LoRARequest],
        users: UserAdapters,
        check: Histogram,
        tracing: Tracing,
    ) -> None:
        self._manifests = manifests
        self._names = names
        self._users = users
        self._check = check
        self._tracing = tracing

    async def prepare(self, name: str) -> None:
        """Check a recipe, hold its name for the rest of the current HTTP request, and load its user adapter.

        Raises MtaError: the name is not canonical, no bank of this engine can fuse it, or its user adapter is at fault.
        """
        with timed(self._check):
            recipe = checked_recipe(name, self._manifests)
            self._names.lease(name)
        held = _held.get()
        try:
            if recipe.user_adapter is not None:
                await self._users.ensure(recipe)
        except BaseException:
            self._names.release(name)
            raise
        if held is None:  # not inside a request: nothing would ever release it
            self._names.release(name)
        else:
            held.append(name)

    def install(self) -> None:
        """Make vLLM's serving classes prepare recipe names where they check that a model exists."""

        def preparing(vllm_check: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
            async def check_model(serving: Any, request: Any) -> Any:
                if is_recipe_name(request.model):
                    try:
                        with self._tracing.span("prepare", follows=traceparent.get()):
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


class HoldNames:
    """ASGI middleware: names prepared during an HTTP request are released when it has ended, streams included."""

    def __init__(self, app: ASGIApp, names: Callable[[], AdapterNames[LoRARequest] | None]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[str] = []
        token = _held.set(held)
        try:
            await self._app(scope, receive, send)
        finally:
            _held.reset(token)
            if names := self._names():
                for name in held:
                    names.release(name)
