"""Entry point `vllm.endpoint_plugins`: wires the plugin into the API process and adds the route `/mta/v1/`."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Set
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import REGISTRY
from pydantic import BaseModel
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest

from bank.errors import BankError
from server.engine.admission import metrics
from server.engine.admission.door import Door
from server.engine.admission.drain import Drain
from server.engine.admission.names import AdapterNames
from server.engine.admission.prepare import HoldNames, Preparer
from server.engine.admission.user_adapters import SWEEP_S, RpcWorkers, UserAdapters
from server.engine.banks import read_manifests
from server.engine_protocol import DROP, PLUGIN, RESIDENT, STATUS
from server.settings import Settings
from server.store.opening import open_stores
from server.watching.background import StoreSeconds, forever
from server.watching.logs import RequestIds
from server.watching.tracing import Tracing

IDLE_ADAPTER_BYTES = 256 << 20
"""User adapters that an engine keeps beyond those in use."""
log = logging.getLogger("mta.engine")


class Drop(BaseModel):
    """Body of a drop: whose adapters to let go of."""

    user_key: str


class MtaEndpointPlugin:
    """vLLM's `EndpointPlugin` protocol: routes first, then the state behind them."""

    name = PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._names: AdapterNames[LoRARequest] | None = None
        self._keys: list[bytes] = []
        self._opened = AsyncExitStack()  # for as long as the process lives
        self._figures: metrics.AdapterFigures | None = None
        self._watching: asyncio.Task[None] | None = None  # the event loop holds tasks only weakly

    def attach_router(self, app: FastAPI) -> None:
        """Add the private routes, the middleware that holds names while a request is open, and the door in front."""
        app.include_router(_router())
        app.add_middleware(HoldNames, names=self._require_names)
        app.add_middleware(metrics.Refreshing, figures=lambda: self._figures)
        app.add_middleware(RequestIds)
        build = app.build_middleware_stack  # vLLM adds its own middleware later, and so further out
        drain = Drain(Settings().drain_s)
        app.build_middleware_stack = lambda: Door(build(), lambda: self._keys, drain)  # type: ignore[method-assign]

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Read the banks, take over the model names, and refuse options that are not safe to serve with.

        Raises:
            BankError: names the option or the bank that is wrong.
        """
        settings = Settings()
        keys = _api_keys(args)
        _refuse_unsafe(engine_client, args, keys, settings)
        self._keys = [key.encode() for key in keys]
        models = state.openai_serving_models
        manifests = read_manifests(settings)

        def in_flight() -> Set[str]:
            requests = engine_client.output_processor.request_states.values()  # type: ignore[union-attr]
            return {request.lora_name for request in requests if request.lora_name}

        self._names = AdapterNames(
            models.lora_requests,
            # vLLM's prefix cache is keyed by name and path: with the name as path the cache is always right.
            lambda name, lora_id: LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=name),
            capacity=settings.max_adapter_names,
            in_flight=in_flight,
        )
        names = self._names
        timed = StoreSeconds(REGISTRY)
        # Nothing is written here.
        stores = await self._opened.enter_async_context(open_stores(settings, checked=False, timed=timed))
        users = UserAdapters(
            stores.adapters,
            RpcWorkers(engine_client.collective_rpc),  # type: ignore[union-attr]
            manifests,
            max_rank=args.max_lora_rank,
            capacity_bytes=IDLE_ADAPTER_BYTES,
            in_use=lambda: names.in_use,
        )
        self._watching = asyncio.create_task(forever(SWEEP_S, users.sweep, log))
        preparer = Preparer(manifests, names, users, _tracing(settings))
        preparer.install()
        self._figures = metrics.install(engine_client, names, preparer.check, args.max_loras)
        state.mta = _Behind(preparer, self._figures, max_lora_rank=args.max_lora_rank, slots=args.max_loras)

    def _require_names(self) -> AdapterNames[LoRARequest]:
        if self._names is None:
            raise BankError("the engine's plugin served a request before it was initialised")
        return self._names


def _tracing(settings: Settings) -> Tracing:
    """Adds to the traces that vLLM sends."""
    if not settings.otlp_endpoint:
        return Tracing()
    from server.watching.otlp import SpanTracing

    return SpanTracing()


def _api_keys(args: Namespace) -> list[str]:
    """The keys vLLM itself accepts."""
    given: list[str] = [key for key in (args.api_key or []) if key]
    return given or [key for key in (os.environ.get("VLLM_API_KEY"),) if key]


def _refuse_unsafe(engine_client: EngineClient | None, args: Namespace, keys: list[str], settings: Settings) -> None:
    """Check the options that the plugin's correctness depends on."""
    if engine_client is None or not args.enable_lora:
        raise BankError("the engine runs without LoRA: start it with `mta engine`, or pass --enable-lora")
    if (getattr(args, "api_server_count", None) or 1) != 1:
        raise BankError(
            f"--api-server-count is {args.api_server_count}: recipes get their ids in one API process: use 1"
        )
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() in ("1", "true"):
        raise BankError("VLLM_ALLOW_RUNTIME_LORA_UPDATING lets anyone bind a name to a folder: unset it")
    if not keys:
        raise BankError("the engine has no key: set VLLM_API_KEY (`mta engine` sets it from MTA_ENGINE_KEY)")
    if (args.max_cpu_loras or args.max_loras) <= args.max_loras:
        raise BankError(f"--max-cpu-loras is {args.max_cpu_loras}: it must be above --max-loras, {args.max_loras}")
    needed = max(manifest.serving_rank for manifest in read_manifests(settings).values())
    if args.max_lora_rank < needed:
        raise BankError(f"--max-lora-rank is {args.max_lora_rank}: the bank needs at least {needed}")


@dataclass(frozen=True, slots=True)
class _Behind:
    """The state behind the private routes."""

    preparer: Preparer
    figures: metrics.AdapterFigures
    max_lora_rank: int
    slots: int


def _behind(request: Request) -> _Behind:
    behind: _Behind = request.app.state.mta
    return behind


def _router() -> APIRouter:
    """The private routes, behind `Door`; the gateway calls them on each engine, never through a router."""
    router = APIRouter()

    @router.get(STATUS)
    async def status(request: Request) -> dict[str, Any]:
        """What this engine serves; known here, so that the answer never waits for a step of the model."""
        engine, behind = request.app.state.engine_client, _behind(request)
        preparer = behind.preparer
        return {
            "status": "ok",
            "model": engine.model_config.model,
            "max_model_len": engine.model_config.max_model_len,
            "banks": [manifest.fingerprint for manifest in preparer.manifests.values()],
            "max_lora_rank": behind.max_lora_rank,
            "max_num_seqs": engine.vllm_config.scheduler_config.max_num_seqs,
            "slots": behind.slots,
            "names": len(preparer.names),
            "user_adapters": len(preparer.users),
            **behind.figures.brief(),
        }

    @router.get(RESIDENT)
    async def resident(request: Request) -> dict[str, list[str]]:
        """What the workers say they hold: fused recipes, and stacked ones whose user adapter is still there."""
        rpc = request.app.state.engine_client.collective_rpc
        fused, held = await asyncio.gather(rpc("mta_resident"), rpc("mta_held"))
        return {"resident": fused[0], "held": sorted({name for worker in held for name in worker})}

    @router.post(DROP)
    async def drop(request: Request, body: Drop) -> dict[str, int]:
        """Let go of a user's adapters; answers how many are still held by unfinished requests."""
        return {"held": await _behind(request).preparer.users.drop(body.user_key)}

    return router
