"""The plan of `mta up`: the parts to start, with their ports and secrets, and how engines and worker share the GPUs."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Callable, Sequence
from math import floor
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretStr

from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.manifest import BankManifest
from bank.models.folders import ensure_embedder, model_config
from server.engine.command import Share, check_engine, engine_command, is_cpu_build, memory_bytes, slot_bytes
from server.settings import Settings
from server.supervisor import services
from server.supervisor.data_folder import DataFolder

STORE_SHARE = 8  # Valkey may store 1/8 of the memory; the rest is for engine and worker
GIB = 1 << 30
MAX_GPU_SHARE = 0.92  # maximum share of a card for all our processes together: vLLM's default
CUDA_BYTES = GIB  # estimate for CUDA and its libraries, per process
FORWARD_BYTES = 2 * GIB  # estimate for an engine's activations and graphs
MIN_TRAINING_BYTES = 2 * GIB  # minimum for a job besides the base model; a large model needs a quarter of its size
_NUMBER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# CUDA itself would occupy GPU memory as long as this process runs.
_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free", "--format=csv,noheader,nounits")


def parts_of(settings: Settings, data: DataFolder, say: Callable[[str], None]) -> list[services.Part]:
    """Check bank, base model and embedder, and return the parts without starting them; `say` gets the GPU plan."""
    given = settings.model_fields_set
    embedder = ensure_embedder(settings.embedder, settings.cache_dir)
    ServingBank.open(settings.bank_folder(), Embedder.load(embedder).id)
    settings = _with(settings, embedder=embedder, secret=settings.secret or SecretStr(data.secret))
    if "drain_s" not in given:
        settings = _with(settings, drain_s=services.DRAIN_S)
    parts = []
    if "redis_url" not in given:
        store_mib = settings.store_mib or memory_bytes() // STORE_SHARE >> 20
        parts.append(services.valkey_part(data, store_mib << 20))
        settings = _with(settings, redis_url=services.valkey_url(data.path))
    if given & {"engine_url", "engine_urls"}:  # external engines come with external workers
        return [*parts, services.gateway_part(settings)]
    settings, engines, gpu = _engines(settings, say)
    # vLLM measures free GPU memory at startup.
    before_worker = [part.name for part in engines] if settings.worker_gpu_share else []
    worker = services.worker_part(settings, data.log("worker"), before_worker, gpu)
    return [*parts, *engines, services.gateway_part(settings, services.ENGINE_START_S), worker]


def _engines(settings: Settings, say: Callable[[str], None]) -> tuple[Settings, list[services.Part], str | None]:
    """Return the settings with the engines' URLs, one engine or several and a router, and the worker's GPU, if any."""
    settings = _with(settings, engine_key=settings.engine_key or SecretStr(secrets.token_urlsafe(32)))
    manifests, model_folder = check_engine(settings)
    gpu = None
    if not is_cpu_build():
        engines = settings.replicas * settings.tensor_parallel_size
        shares = plan(cards(), engines, needs_of(model_folder, manifests, settings), settings)
        say(shares.summary)
        settings = _with(settings, engine_gpu_share=shares.engine, worker_gpu_share=shares.worker)
        gpu = shares.worker_card
    urls, parts = list[str](), list[services.Part]()
    for place in range(settings.replicas):
        alone = settings.replicas == 1
        own = _with(settings, engine_port=services.free_port())
        command = engine_command(own, manifests, model_folder, None if alone else Share(place, settings.replicas))
        parts.append(services.engine_part(own, *command, "engine" if alone else f"engine-{place + 1}"))
        urls.append(f"http://{parts[-1].address}")
    if settings.replicas == 1:
        return _with(settings, engine_url=urls[0]), parts, gpu
    port = services.free_port()
    url = f"http://{services.LOOPBACK}:{port}"
    settings = _with(settings, engine_urls=",".join(urls), router_port=port, engine_url=url)
    return settings, [*parts, services.router_part(_with(settings, metrics_port=services.free_port()))], gpu


def _with(settings: Settings, **changed: object) -> Settings:
    return settings.model_copy(update=changed)


class Card(NamedTuple):
    """A GPU: its name for CUDA, and its total and free memory in bytes."""

    name: str
    total: int
    free: int


class Needs(NamedTuple):
    """Estimated GPU memory of each process, in bytes."""

    engine: int  # its share of the weights, the adapter slots, the KV cache of one full context, and activations
    worker: int  # the base model, one job, and CUDA


class GpuPlan(NamedTuple):
    """How engines and worker share the GPUs."""

    engine: float | None  # share of each engine's card; None leaves it to vLLM
    worker: float  # share of the worker's card; 0 means the CPU
    worker_card: str | None  # CUDA's name for that card; None means the CPU
    summary: str  # the plan in words


def plan(cards: Sequence[Card], engines: int, needs: Needs, settings: Settings) -> GpuPlan:
    """Give the first cards to the engines and an unused one to the worker, and keep the settings' shares.

    Without an unused card the worker shares the last engine's, if the engine keeps what it needs and at least half.
    """
    fixed, wanted = settings.engine_gpu_share, settings.worker_gpu_share
    if len(cards) < engines:
        engine = "vLLM's default share" if fixed is None else f"{fixed:.0%}"
        summary = f"GPU: memory size not known; the engine takes {engine}, the worker trains on the "
        return GpuPlan(fixed, wanted or 0.0, None, summary + (f"same GPU, within {wanted:.0%}" if wanted else "CPU"))
    taken, unused = cards[:engines], cards[engines:]
    total = min(card.total for card in taken)
    usable = min(min(card.free, int(MAX_GPU_SHARE * card.total)) for card in taken)
    needed = needs.worker if wanted is None else int(wanted * total) + CUDA_BYTES
    kept = max(needs.engine, usable // 2) if fixed is None else int(fixed * total)
    if wanted == 0:
        place, where = None, "the CPU (MTA_WORKER_GPU_SHARE is 0)"
    elif unused and unused[0].free >= needed:
        place, where = unused[0], f"GPU {unused[0].name}"
    elif wanted or usable - needed >= kept:
        place, where = taken[-1], f"GPU {taken[-1].name}"
    else:
        place, where = None, f"the CPU: it would need {_gib(needed)} beside the engine's {_gib(kept)}"
    engine_share, worker_share = fixed or _share(usable - (needed if place is taken[-1] else 0), total), 0.0
    if place:
        worker_share = wanted or _share(needed - CUDA_BYTES, place.total)
        where += f", within {worker_share:.0%} of its memory"
    names = ", ".join(f"GPU {card.name}" for card in taken)
    engine = f"{names}: {_gib(usable)} of {_gib(total)} usable, the engine takes {engine_share:.0%} of the total"
    return GpuPlan(engine_share, worker_share, place.name if place else None, f"{engine}, the worker trains on {where}")


def needs_of(model_folder: Path, manifests: Sequence[BankManifest], settings: Settings) -> Needs:
    """Estimate the memory of an engine and a worker; rather too much than too little."""
    config = model_config(model_folder)
    stored = _NUMBER_BYTES.get(config.get("dtype") or config.get("torch_dtype") or "", 2)
    weights = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in model_folder.glob(kind))
    number = _NUMBER_BYTES.get(settings.dtype, 2)
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or config.get("hidden_size", 0) // heads
    token = 2 * config.get("num_hidden_layers", 0) * (config.get("num_key_value_heads") or heads) * width * number
    context = token * (settings.max_model_len or config.get("max_position_embeddings", 0))
    slots = (settings.max_loras or settings.max_num_seqs) * slot_bytes(manifests, number)
    shared = (weights * number // stored + context) // settings.tensor_parallel_size
    trained = weights * 2 // stored
    return Needs(shared + slots + FORWARD_BYTES, trained + max(MIN_TRAINING_BYTES, trained // 4) + CUDA_BYTES)


def cards() -> list[Card]:
    """Return the GPUs that this process may use, in CUDA's order; none if `nvidia-smi` does not report their memory."""
    try:
        output = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=30).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip()]
        known = {name: (int(total) << 20, int(free) << 20) for *names, total, free in rows for name in names}
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # indexes or UUIDs
    names = [row[0] for row in rows] if visible is None else [name.strip() for name in visible.split(",")]
    return [Card(name, *known[name]) for name in names if name in known]


def _share(part: int, total: int) -> float:
    """Return `part / total` rounded down to hundredths, at least 0.01; 92 % in whole bytes must give 0.92."""
    return max(0.01, floor(100 * part / total + 1e-6) / 100)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
