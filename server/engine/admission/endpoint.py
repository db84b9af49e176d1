"""Entry point `vllm.endpoint_plugins`: connects the plugin to the API process and adds the routes `/mta/v1/`."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Set
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI
from prometheus_client import REGISTRY
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.renderers.chat_utils import load_chat_template

from bank.errors import BankError
from bank.manifest import read_manifest
from bank.models.folders import prompt_hashes
from server.engine.admission import metrics
from server.engine.admission.access import AccessMiddleware, Drain
from server.engine.admission.canary import check_canary
from server.engine.admission.prepare import AdapterNames, HoldNames, Manifests, Preparer
from server.engine.admission.user_adapters import SWEEP_S, UserAdapters
from server.engine.fusing.metrics import timed
from server.engine.shared_part import CommonRecipes
from server.engine_protocol import DROP, PLUGIN, RESIDENT, STATUS
from server.observability.background import StoreSeconds, forever
from server.observability.logs import RequestIds
from server.observability.tracing import Tracing
from server.settings import Settings
from server.store.opening import open_stores

IDLE_ADAPTER_BYTES = 256 << 20  # maximum size of the user adapters that an engine keeps, unless more are in use
NAMES_PER_ADAPTER = 4  # idle recipes whose ids an engine remembers, for each adapter that its workers can hold
log = logging.getLogger("vllm.mta")


class MtaEndpointPlugin:
    """Implements vLLM's `EndpointPlugin` protocol: vLLM first adds the routes, then initialises their state."""

    name = PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._resources = AsyncExitStack()  # stays open until the process ends
        self._engine: Any = None
        self._users: UserAdapters | None = None
        self._metrics: metrics.AdapterMetrics | None = None
        self._status: Callable[[], dict[str, Any]] = dict
        self._sweeping: asyncio.Task[None] | None = None  # the event loop keeps only weak references to tasks

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(HoldNames)
        app.add_middleware(metrics.RefreshMetrics, metrics=lambda: self._metrics)
        app.add_middleware(RequestIds)
        app.add_api_route(STATUS, self.status)
        app.add_api_route(RESIDENT, self.resident)
        app.add_api_route(DROP, self.drop, methods=["POST"])
        build = app.build_middleware_stack  # wrapped here, because vLLM adds its own middleware later, outside ours
        drain = Drain(Settings().drain_s)

        def build_guarded() -> AccessMiddleware:
            # vLLM's own check knows no second key.
            app.user_middleware = [each for each in app.user_middleware if each.cls is not AuthenticationMiddleware]
            return AccessMiddleware(build(), lambda: self._keys, drain)

        app.build_middleware_stack = build_guarded  # type: ignore[method-assign]

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Read the banks and install the plugin's state; raise BankError for options that are unsafe to serve with."""
        settings = Settings()
        manifests = {manifest.short: manifest for manifest in map(read_manifest, settings.banks)}
        keys = [key for key in args.api_key or os.environ.get("VLLM_API_KEY", "").split(",") if key]
        _refuse_unsafe(engine_client, args, keys, manifests)
        self._keys = [key.encode() for key in keys]
        engine: Any = engine_client
        self._engine = engine

        def in_flight() -> Set[str]:
            requests = engine.output_processor.request_states.values()
            return {request.lora_name for request in requests if request.lora_name}

        capacity = NAMES_PER_ADAPTER * args.max_cpu_loras
        names = AdapterNames(state.openai_serving_models.lora_requests, capacity, in_flight)
        commons = CommonRecipes.of(manifests.values())
        for common in commons.by_bank.values():
            names.reserve(common)
        opening = open_stores(settings, checked=False, timed=StoreSeconds(REGISTRY))  # the engine only reads
        stores = await self._resources.enter_async_context(opening)
        self._users = users = UserAdapters(
            stores.adapters,
            engine.collective_rpc,
            manifests,
            max_rank=args.max_lora_rank,
            capacity_bytes=IDLE_ADAPTER_BYTES,
            in_use=lambda: names.in_use,
        )
        slots = args.max_loras - len(commons)
        self._sweeping = asyncio.create_task(forever(SWEEP_S, users.sweep, log))
        self._metrics = adapter_metrics = metrics.publish(engine, names, slots)
        tracing = Tracing()
        if settings.otlp_endpoint:
            from server.observability.otlp import SpanTracing

            tracing = SpanTracing()
        prompts = prompt_hashes(Path(engine.model_config.model))
        check = partial(timed, adapter_metrics.check)
        tokenizer = engine.get_tokenizer()
        tokenizer.chat_template = load_chat_template(args.chat_template) or tokenizer.chat_template
        Preparer(manifests, names, users, check, tracing, tokenizer).install()
        sampling = engine.model_config.get_diff_sampling_param()
        dtype = engine.model_config.quantization or str(engine.model_config.dtype).removeprefix("torch.")
        for manifest in manifests.values() if settings.canary else ():
            await check_canary(engine, names, manifest, dtype)
        self._status = lambda: {
            "status": "ok",
            "model": engine.model_config.model,
            "dtype": dtype,
            "max_model_len": engine.model_config.max_model_len,
            "sampling": sampling,
            "banks": [manifest.fingerprint for manifest in manifests.values()],
            "prompts": prompts,
            "max_lora_rank": args.max_lora_rank,
            "max_num_seqs": engine.vllm_config.scheduler_config.max_num_seqs,
            "slots": slots,
            "names": len(names),
            "user_adapters": len(users),
            **adapter_metrics.summary(),
        }

    async def status(self) -> dict[str, Any]:
        return self._status()

    async def resident(self) -> dict[str, list[str]]:
        """Return the fused recipes of the first worker, and the stacked recipes whose user adapter any worker holds."""
        rpc = self._engine.collective_rpc
        fused, held = await asyncio.gather(rpc("mta", args=("resident",)), rpc("mta", args=("held",)))
        return {"resident": fused[0], "held": sorted({name for worker in held for name in worker})}

    async def drop(self, user_key: Annotated[str, Body(embed=True)]) -> dict[str, int]:
        """Drop a user's adapters; return how many are still held by unfinished requests."""
        return {"held": await self._users.drop(user_key) if self._users else 0}


def _refuse_unsafe(engine_client: EngineClient | None, args: Namespace, keys: list[str], manifests: Manifests) -> None:
    if engine_client is None or not args.enable_lora:
        raise BankError("the engine runs without LoRA: start it with `mta engine`, or pass --enable-lora")
    if (getattr(args, "api_server_count", None) or 1) != 1:
        raise BankError(
            f"--api-server-count is {args.api_server_count}: recipes need a single API process for their ids: use 1"
        )
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() in ("1", "true"):
        raise BankError("VLLM_ALLOW_RUNTIME_LORA_UPDATING lets anyone bind a name to a folder: unset it")
    if args.lora_modules:
        raise BankError("--lora-modules takes ids that recipes get: serve such adapters by a bank (`mta bank import`)")
    if not keys:
        raise BankError("the engine has no key: set VLLM_API_KEY (`mta engine` sets it from MTA_ENGINE_KEY)")
    if (args.max_cpu_loras or args.max_loras) <= args.max_loras:
        raise BankError(f"--max-cpu-loras is {args.max_cpu_loras}: it must be above --max-loras, {args.max_loras}")
    if any(manifest.shares_prompts for manifest in manifests.values()):
        for option in ("kv_transfer_config", "kv_events_config", "kv_offloading_size"):
            if getattr(args, option, None):
                raise BankError(
                    f"--{option.replace('_', '-')} does not know the shared beginnings of prompts: leave it out, or "
                    "build the bank with --acts everywhere"
                )
        if getattr(args, "specialize_active_lora", False) and not engine_client.vllm_config.use_v2_model_runner:
            raise BankError("--specialize-active-lora counts no common recipe with vLLM's first model runner")
    needed = max(manifest.serving_rank for manifest in manifests.values())
    if args.max_lora_rank < needed:
        raise BankError(f"--max-lora-rank is {args.max_lora_rank}: the bank needs at least {needed}")
