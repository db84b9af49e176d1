"""What `mta up` starts on this machine: which parts, on which ports, and with which secrets."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from pydantic import SecretStr

from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.models.folders import ensure_embedder
from server.cli.run.card import cards, needs_of, plan
from server.engine.command import Share, check_engine, engine_command, is_cpu_build
from server.engine.sizing import memory_bytes
from server.settings import Settings
from server.supervisor.data_folder import DataFolder
from server.supervisor.part import Part
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
    """What to start, after checking bank, base model and embedder; nothing runs yet.

    Args:
        settings: the command's.
        data: where everything is kept.
        say: is told how GPUs are shared.

    Raises:
        MtaError: when one of them is missing, damaged, or not made for the others.
    """
    bank_folder = settings.bank_folder()
    own_store = "redis_url" not in settings.model_fields_set
    own_engines = not settings.model_fields_set & {"engine_url", "engine_urls"}
    embedder = ensure_embedder(settings.embedder, settings.cache_dir)
    ServingBank.open(bank_folder, Embedder.load(embedder).id)
    update: dict[str, object] = {"embedder": embedder, "secret": settings.secret or SecretStr(data.secret)}
    parts = []
    if "drain_s" not in settings.model_fields_set:
        update["drain_s"] = DRAIN_S
    if own_store:
        part, update["redis_url"] = valkey_part(data, (settings.store_mib or memory_bytes() // STORE_SHARE >> 20) << 20)
        parts.append(part)
    settings = settings.model_copy(update=update)
    if not own_engines:  # engines elsewhere have workers elsewhere
        return settings, [*parts, gateway_part(settings)]
    settings, engines, gpu = _engines(settings, say)
    gateway = gateway_part(settings, ENGINE_START_S)
    after = [part.name for part in engines] if settings.worker_gpu_share else []
    worker = worker_part(settings, data.log("worker"), after, gpu)
    return settings, [*parts, *engines, gateway, worker]


def _engines(settings: Settings, say: Callable[[str], None]) -> tuple[Settings, list[Part], str | None]:
    """The settings by which the engines are found; one engine, or several and a router; the worker's GPU, if any."""
    settings = settings.model_copy(
        update={"engine_key": settings.engine_key or SecretStr(secrets.token_urlsafe(32)), "engine_host": LOOPBACK}
    )
    checked, parts, urls, several = check_engine(settings), [], [], settings.replicas > 1
    manifests, model_folder = checked
    gpu = None
    if not is_cpu_build():
        needs = needs_of(model_folder, manifests, settings)
        shares = plan(cards(), settings.replicas * settings.tensor_parallel_size, needs, settings)
        say(shares.said)
        settings = settings.model_copy(update={"engine_gpu_share": shares.engine, "worker_gpu_share": shares.worker})
        gpu = shares.worker_card
    for place in range(settings.replicas):
        port = free_port()
        urls.append(f"http://{LOOPBACK}:{port}")
        own = settings.model_copy(update={"engine_port": port, "engine_url": urls[-1]})
        share = Share(place, settings.replicas) if several else None
        command = engine_command(own, *checked, share)
        parts.append(engine_part(own, *command, f"engine-{place + 1}" if several else "engine"))
    settings = settings.model_copy(update={"engine_url": urls[0], "engine_urls": ",".join(urls)})
    if several:
        found: dict[str, object] = {"router_host": LOOPBACK, "router_port": free_port()}
        found |= {"engine_url": f"http://{LOOPBACK}:{found['router_port']}", "router_metrics_port": free_port()}
        settings = settings.model_copy(update=found)
        parts.append(router_part(settings))
    return settings, parts, gpu
