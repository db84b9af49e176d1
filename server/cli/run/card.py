"""The plan by which engines and worker of one machine share its GPUs, made and printed before either takes a byte.

vLLM takes a share of the whole card at its start and measures meanwhile what else is there, so nothing else may come or
go then. The worker starts after it, within what the plan leaves, or on the CPU.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path

from bank.manifest import BankManifest
from bank.models.folders import model_config
from server.engine.command import slot_bytes
from server.settings import Settings

GIB = 1 << 30
MOST = 0.92
"""The share of a card that all our processes may take together: vLLM's own default."""
CUDA_BYTES = GIB
"""About what CUDA and its libraries take for each process."""
FORWARD_BYTES = 2 * GIB
"""About what an engine takes for activations and graphs."""
LEAST_TRAINING_BYTES = 2 * GIB
"""What a job takes beside the base model; a quarter of a large one's size."""

_NUMBER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free", "--format=csv,noheader,nounits")
_QUERY_S = 30
_EXACT = 1e-6  # 92 % of a size, in whole bytes, is 92 hundredths of it


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: the name by which CUDA finds it, its memory, and how much of that is free."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What has to fit on a card, in bytes.

    Of an engine its part of the weights, adapter slots, the cache of one whole context, and what it computes in; of the
    worker the base model, what a job takes, and CUDA's own.
    """

    engine: int
    worker: int


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """Who takes what.

    Attributes:
        engine: share of each of the engines' cards; None leaves it to vLLM.
        worker: share of the worker's card, on which it starts after the engines; 0 is the CPU.
        worker_card: CUDA's name for that card; None on the CPU.
        said: the same, for people.
    """

    engine: float | None
    worker: float
    worker_card: str | None
    said: str


def plan(cards: Sequence[Card], engines: int, needs: Needs, settings: Settings) -> GpuPlan:
    """Share the cards out.

    A card that no engine has is the worker's. Else it gets a part of the last engine's, if the engine keeps what it
    needs, and at least half. What the settings say stays as they say it. Engines have the first `engines` of the cards.
    """
    fixed, wanted = settings.engine_gpu_share, settings.worker_gpu_share
    if len(cards) < engines:
        engine = "what vLLM takes by itself" if fixed is None else f"{fixed:.0%}"
        said = f"GPU: how much memory it has is not known, the engine takes {engine}, the worker trains on the "
        return GpuPlan(fixed, wanted or 0.0, None, said + (f"same, within {wanted:.0%}" if wanted else "CPU"))
    taken, spare = cards[:engines], cards[engines:]
    total, usable = min(card.total for card in taken), min(min(card.free, int(MOST * card.total)) for card in taken)
    needed = needs.worker if wanted is None else int(wanted * total) + CUDA_BYTES
    kept = max(needs.engine, usable // 2) if fixed is None else int(fixed * total)
    if wanted == 0:
        place, where = None, "the CPU, as MTA_WORKER_GPU_SHARE says"
    elif spare and spare[0].free >= needed:
        place, where = spare[0], f"GPU {spare[0].name}"
    elif wanted or usable - needed >= kept:
        place, where = taken[-1], f"GPU {taken[-1].name}"
    else:
        place, where = None, f"the CPU: it would need {_gib(needed)} beside the engine's {_gib(kept)}"
    engine_share = fixed or _share(usable - (needed if place is taken[-1] else 0), total)
    worker_share = 0.0
    if place:
        worker_share = wanted or _share(needed - CUDA_BYTES, place.total)
        where += f", within {worker_share:.0%} of it"
    names = ", ".join(f"GPU {card.name}" for card in taken)
    said = f"{names}: {_gib(usable)} of {_gib(total)} can be used, the engine takes {engine_share:.0%} of all"
    return GpuPlan(engine_share, worker_share, place.name if place else None, f"{said}, the worker trains on {where}")


def needs_of(model_folder: Path, manifests: Sequence[BankManifest], settings: Settings) -> Needs:
    """About what an engine and a worker need; too much rather than too little."""
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
    return Needs(
        engine=shared + slots + FORWARD_BYTES,
        worker=trained + max(LEAST_TRAINING_BYTES, trained // 4) + CUDA_BYTES,
    )


def cards() -> list[Card]:
    """The GPUs that this process may use, in CUDA's order; none where the driver does not say what they have.

    The driver's tool is asked: CUDA itself would take memory for as long as this process runs.
    """
    try:
        told = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=_QUERY_S).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.strip()]
        found = [(index, uuid, int(total) << 20, int(free) << 20) for index, uuid, total, free in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [Card(index, total, free) for index, _, total, free in found]
    known = {name: (total, free) for index, uuid, total, free in found for name in (index, uuid)}
    names = [name.strip() for name in visible.split(",")]
    return [Card(name, *known[name]) for name in names if name in known]


def _share(part: int, total: int) -> float:
    """A part as a share, in hundredths, rounded down."""
    return max(0.01, floor(100 * part / total + _EXACT) / 100)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
