"""What `mta up` starts on this machine: which parts, on which ports, and with which secrets."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from pydantic import SecretStr

from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.models.folders import ensure_embedder
from server.cli.run.card import cards, needs_of, plan
from server.engine.command import Share, check_engine, engine_command, is_cpu_build, memory_bytes
from server.settings import Settings
from server.supervisor.data_folder import DataFolder
from server.supervisor.parts import Part
from server.supervisor.router import router_part
from server.supervisor.services import (
    DRAIN_S,
    ENGINE_START_S,
    LOOPBACK,
    engine_part,
    free_port,
    gateway_part,
    valkey_part,
    worker_part,
)

STORE_SHARE = 8
"""Valkey may store one part in so many of the memory that is here; engine and worker want the rest."""


def parts_of(settings: Settings, data: DataFolder, say: Callable[[str], None]) -> tuple[Settings, list[Part]]:
    """What to start, after checking bank, base model and embedder; nothing runs yet. `say` is told how GPUs are shared.

    Raises:
        MtaError: when one of them is missing, damaged, or not made for the others.
    """
    given = settings.model_fields_set
    embedder = ensure_embedder(settings.embedder, settings.cache_dir)
    ServingBank.open(settings.bank_folder(), Embedder.load(embedder).id)
    settings = _with(settings, embedder=embedder, secret=settings.secret or SecretStr(data.secret))
    if "drain_s" not in given:
        settings = _with(settings, drain_s=DRAIN_S)
    parts = []
    if "redis_url" not in given:
        store_mib = settings.store_mib or memory_bytes() // STORE_SHARE >> 20
        valkey, url = valkey_part(data, store_mib << 20)
        settings = _with(settings, redis_url=url)
        parts.append(valkey)
    if given & {"engine_url", "engine_urls"}:  # engines elsewhere have workers elsewhere
        return settings, [*parts, gateway_part(settings)]
    settings, engines, gpu = _engines(settings, say)
    before_worker = [part.name for part in engines] if settings.worker_gpu_share else []
    worker = worker_part(settings, data.log("worker"), before_worker, gpu)
    return settings, [*parts, *engines, gateway_part(settings, ENGINE_START_S), worker]


def _engines(settings: Settings, say: Callable[[str], None]) -> tuple[Settings, list[Part], str | None]:
    """The settings by which the engines are found; one engine, or several and a router; the worker's GPU, if any."""
    settings = _with(settings, engine_key=settings.engine_key or SecretStr(secrets.token_urlsafe(32)))
    manifests, model_folder = check_engine(settings)
    gpu = None
    if not is_cpu_build():
        engines = settings.replicas * settings.tensor_parallel_size
        shares = plan(cards(), engines, needs_of(model_folder, manifests, settings), settings)
        say(shares.said)
        settings = _with(settings, engine_gpu_share=shares.engine, worker_gpu_share=shares.worker)
        gpu = shares.worker_card
    if settings.replicas == 1:
        settings = _with(settings, **_listening())
        return settings, [engine_part(settings, *engine_command(settings, manifests, model_folder))], gpu
    parts, urls = [], []
    for place in range(settings.replicas):
        own = _with(settings, **_listening())
        command = engine_command(own, manifests, model_folder, Share(place, settings.replicas))
        parts.append(engine_part(own, *command, f"engine-{place + 1}"))
        urls.append(own.engine_url)
    port = free_port()
    router_url = f"http://{LOOPBACK}:{port}"
    settings = _with(settings, engine_urls=",".join(urls), router_port=port, engine_url=router_url)
    return settings, [*parts, router_part(_with(settings, metrics_port=free_port()))], gpu


def _listening() -> dict[str, object]:
    """Where an engine listens, on a free port."""
    port = free_port()
    return {"engine_port": port, "engine_url": f"http://{LOOPBACK}:{port}"}


def _with(settings: Settings, **changed: object) -> Settings:
    return settings.model_copy(update=changed)
