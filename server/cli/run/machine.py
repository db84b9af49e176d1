"""The plan of `mta up`: the parts to start, with their ports and secrets, and how engines and worker share the GPUs."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretStr

from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.models.folders import ensure_embedder
from server.cli.run.needs import CUDA_BYTES, GIB, Required, needs_of
from server.engine.command import Share, check_engine, engine_command, is_cpu_build, memory_bytes
from server.errors import Unavailable
from server.settings import Settings
from server.store.opening import open_stores
from server.supervisor import services
from server.supervisor.data_folder import AUDIT_LOG, DataFolder, write_private
from server.supervisor.services import LOOPBACK, Part, free_port

# vLLM's processes talk to each other over TCP, by default on the address that the host name resolves to.
ON_LOOPBACK = {"VLLM_HOST_IP": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
MAX_GPU_SHARE = 0.92  # maximum share of a card for all our processes together: vLLM's default
# CUDA itself would occupy GPU memory as long as this process runs.
_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free", "--format=csv,noheader,nounits")


def parts_of(settings: Settings, data: DataFolder, say: Callable[[str], None]) -> list[Part]:
    """Check bank, base model and embedder, and return the parts without starting them; `say` gets the GPU plan."""
    given, parts, engines, gpu = settings.model_fields_set, list[Part](), list[Part](), None
    embedder = ensure_embedder(settings.embedder, settings.cache_dir)
    ServingBank.open(settings.bank_folder(), Embedder.load(embedder).id)
    settings = _with(settings, embedder=embedder, secret=settings.secret or SecretStr(data.secret))
    settings = _with(settings, audit=settings.audit or data.path / AUDIT_LOG)  # a restore needs to know who was erased
    if "redis_url" not in given:
        store_mib = settings.store_mib or memory_bytes() // 8 >> 20  # the rest is for engine and worker
        valkey = services.valkey_part(data, store_mib << 20)
        settings = _with(settings, redis_url=services.valkey_url(data.path))
        parts.append(replace(valkey, held_up=partial(_unfinished_restore, settings, data.path)))
    if not given & {"engine_url", "engine_urls"}:
        settings, engines, gpu = _engines(settings, say)
        known = (settings.engine_urls, settings.engine_keys[0], str(settings.bank_folder().resolve()))
        write_private(data.path / services.ENGINES, "\n".join(known))
    address, argv = f"{LOOPBACK}:{settings.port}", (sys.executable, "-m", "server.cli")
    gateway = Part("gateway", (*argv, "gateway"), services.environment(settings), address, "/ready", needs=("valkey",))
    if not engines:  # external engines come with external workers, and are running
        return [*parts, replace(gateway, start_timeout_s=120)]
    # The worker knows users only by their hashed keys and calls no engine, so it gets no secret.
    environment = services.environment((name, value) for name, value in settings if not isinstance(value, SecretStr))
    environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    # Engines measure the free memory of their GPU at startup.
    needs = ("valkey", *(part.name for part in engines if settings.worker_gpu_share))
    threads, niceness = f"{settings.worker_threads} threads", settings.worker_niceness
    part = Part("worker", (*argv, "worker"), environment, threads, "ready: bank", needs, niceness=niceness)
    return [*parts, *engines, gateway, replace(part, optional=True)]


async def _unfinished_restore(settings: Settings, data: Path) -> str:
    """Return what ends a restore that was broken off, for which Valkey must run; empty if none was."""
    advice = (
        f"run `mta restore COPY --data {data}` again, with its other options, or stop this and delete {data}/valkey"
    )
    try:
        async with open_stores(settings):
            return ""
    except Unavailable as error:
        return f"a restore was broken off: {advice}" if error.code == "store_incomplete" else ""


def _engines(settings: Settings, say: Callable[[str], None]) -> tuple[Settings, list[Part], str | None]:
    """Return the settings with the engines' URLs, one engine or several and a router, and the worker's GPU, if any."""
    settings = _with(settings, engine_key=settings.engine_key or SecretStr(secrets.token_urlsafe(32)))
    manifests, model_folder = check_engine(settings)
    settings = _with(settings, model=str(model_folder))  # a hub id is resolved once, for the worker as well
    count, gpu, parts = settings.replicas, None, list[Part]()
    if not is_cpu_build():
        settings, gpu, summary = plan(cards(), needs_of(model_folder, manifests, settings), settings)
        say(f"  {summary}")
    for card in range(count):
        own, share = _with(settings, engine_port=free_port()), Share(card, count) if count > 1 else None
        argv, environment = engine_command(own, manifests, model_folder, share)
        name, address = f"engine-{card + 1}" if share else "engine", f"{LOOPBACK}:{own.engine_port}"
        parts.append(Part(name, argv, environment | ON_LOOPBACK, address, "/health", optional=count > 1))
    urls = [f"http://{part.address}" for part in parts]
    settings = _with(settings, engine_urls=",".join(urls), engine_url=urls[0])
    if count > 1:
        own = _with(settings, router_port=free_port(), metrics_port=free_port())
        address = f"{LOOPBACK}:{own.router_port}"
        parts.append(Part("router", *services.router_command(own), address, services.LIVENESS))
        settings = _with(settings, engine_url=f"http://{address}")
    return settings, parts, gpu


def _with(settings: Settings, **changed: object) -> Settings:
    return settings.model_copy(update=changed)


class Card(NamedTuple):
    """A GPU: its name for CUDA, and its total and free memory in bytes."""

    name: str
    total: int
    free: int

    @property
    def usable(self) -> int:
        """What all our processes together may take."""
        return min(self.free, int(MAX_GPU_SHARE * self.total))


def plan(cards: Sequence[Card], needs: Required, settings: Settings) -> tuple[Settings, str | None, str]:
    """Return the settings with the shares of engines and worker, the worker's GPU, if known, and the plan in words.

    The first cards are for the engines, an unused one for the worker. Without an unused card the worker shares the last
    engine's, if the engine keeps what it `needs` and at least half. Shares that the settings have are kept. Samples may
    have as many tokens as a job on a GPU has room for.
    """
    engines = settings.replicas * settings.tensor_parallel_size
    fixed, wanted = settings.engine_gpu_share, settings.worker_gpu_share
    if len(cards) < engines:
        summary = f"GPU: memory size not known, the worker trains on {'the same GPU' if wanted else 'the CPU'}"
        return _with(settings, worker_gpu_share=wanted or 0.0), None, summary
    taken, last = cards[:engines], cards[engines - 1]
    total = min(card.total for card in taken)
    usable = min(card.usable for card in taken)
    kept = int(fixed * total) if fixed else max(needs.engine, usable // 2)
    needed = int(wanted * total) + CUDA_BYTES if wanted else needs.worker
    rooms = [*((card, card.usable) for card in cards[engines:]), (last, needed if wanted else usable - kept)]
    chosen, room = next(((card, room) for card, room in rooms if room >= needed and wanted != 0), (None, 0))
    engine, worker = fixed or (usable - (needed if chosen is last else 0)) / total, 0.0
    where = f"the CPU (on a GPU it needs {needed / GIB:.1f} GiB beside the engine's {kept / GIB:.1f})"
    if chosen:
        given = needed if wanted or chosen is last else room
        worker = wanted or (given - CUDA_BYTES) / chosen.total
        longest = max(0, given - needs.worker + needs.job) // needs.token
        settings = _with(settings, sample_tokens=max(1, min(settings.sample_tokens, longest)))
        where = (
            f"GPU {chosen.name}, within {worker:.0%} of its memory, samples of up to {settings.sample_tokens} tokens"
        )
    names = ", ".join(f"GPU {card.name}" for card in taken)
    summary = f"{names}: the engine takes {engine:.0%} of the memory, the worker trains on {where}"
    return _with(settings, engine_gpu_share=engine, worker_gpu_share=worker), chosen and chosen.name, summary


def cards() -> list[Card]:
    """Return the GPUs that this process may use, in CUDA's order; none if `nvidia-smi` does not report their memory."""
    try:
        output = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=30).stdout
        rows = [line.split(", ") for line in output.splitlines()]
        known = {name: Card(name, int(total) << 20, int(free) << 20) for *names, total, free in rows for name in names}
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # indexes or UUIDs
    names = [row[0] for row in rows] if visible is None else [name.strip() for name in visible.split(",")]
    return [known[name] for name in names if name in known]
