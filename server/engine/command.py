"""Command line and environment of the vLLM process, as used by `mta engine`, `mta up` and the tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TypeVar

from pydantic import SecretStr

from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, read_manifest, verify_files
from bank.models.folders import check_base_model, ensure_base_model, model_config
from server.engine.cpu import native
from server.engine_protocol import BASE_MODEL, PLUGIN
from server.settings import Settings
from server.watching.logs import VLLM_CONFIG
from server.watching.tracing import TRACES_PATH

T = TypeVar("T")

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Configuration keys for the number of experts per layer."""

SLOT_MEMORY_DIVISOR = 16  # on CPU, slots take at most 1/16 of the memory available to this process

MIN_SLOTS, MAX_SLOTS = 8, 64
"""Limits on the number of slots on CPU; with more slots, a batch would have fewer requests than slots."""

VIEWS, VIEW_BYTES = 9, 600
"""Number and size of the tensor views per module and slot, for plain and stacked adapters (`fusing/cells.py`)."""

MEMORY_LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with a container's memory limit, for cgroups v2 and v1."""

_PRELOADED = (
    ("vllm", "libs/libtcmalloc_minimal*.so*", ("libtcmalloc",)),
    ("torch", "../torch.libs/libgomp*.so*", ("libgomp", "libomp", "libiomp")),
    ("torch", "lib/libgomp*.so*", ("libgomp", "libomp", "libiomp")),
)
"""Libraries that vLLM preloads on CPU: package, path pattern, and names of libraries that make it redundant."""


@dataclass(frozen=True, slots=True)
class Share:
    """One engine's share of the machine's cores or GPUs."""

    index: int  # of this engine, from 0
    count: int  # number of engines on the machine

    def part(self, whole: Sequence[T]) -> list[T]:
        """Return this engine's contiguous part, with at least one item."""
        begin, end = (len(whole) * edge // self.count for edge in (self.index, self.index + 1))
        return list(whole[begin:end]) or [whole[self.index % len(whole)]]


def check_engine(settings: Settings) -> tuple[list[BankManifest], Path]:
    """Return the banks and the folder of the base model, fetched if missing; raise MtaError if one cannot be served."""
    folders = settings.banks
    if settings.engine_key is None:
        raise BankError("no engine key: set MTA_ENGINE_KEY to a long random text, the same for gateway and engine")
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        if PLUGIN not in {entry.name for entry in entry_points(group=group)}:
            raise BankError(f"the entry point {group}: {PLUGIN} is not installed: run `pip install .` again")
    model_folder = ensure_base_model(settings.model, settings.cache_dir)
    if is_cpu_build() and (experts := _experts(model_config(model_folder))) > 1:
        raise BankError(
            f"the base model at {model_folder} is a Mixture of Experts ({experts} a layer): vLLM serves such models "
            "only on GPUs; on CPU its kernels lack Triton, and the engine would crash at the first request. Use a "
            "dense model or a GPU"
        )
    banks = {folder: read_manifest(folder) for folder in folders}
    for folder, manifest in banks.items():
        verify_files(folder, manifest, (MATRIX_FILE,))
    check_base_model(model_folder, banks)
    if is_cpu_build():
        native.build(settings.cache_dir)
    return list(banks.values()), model_folder


def _experts(config: object) -> int:
    """Return the maximum number of experts per layer in a model's configuration, or in a part of it."""
    if isinstance(config, list):
        return max(map(_experts, config), default=0)
    if not isinstance(config, dict):
        return 0
    counts = [config.get(name) for name in EXPERT_KEYS]
    numbers = [n for value in counts for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
    return max([*numbers, *map(_experts, config.values())], default=0)


def engine_command(
    settings: Settings, manifests: Sequence[BankManifest], model_folder: Path, share: Share | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return argv and environment of the vLLM process, for a `share` of this machine if given; check nothing."""
    on_cpu = is_cpu_build()
    cores = sorted(os.sched_getaffinity(0))
    number_bytes = 4 if settings.dtype == "float32" else 2
    slots = settings.max_loras or (_slots_on_cpu(manifests, number_bytes) if on_cpu else settings.max_num_seqs)
    scheduler = "FairScheduler" if on_cpu else "FairAsyncScheduler"
    options: dict[str, object] = {
        "model": model_folder,
        "served-model-name": BASE_MODEL,
        "host": settings.inner_host,
        "port": settings.engine_port,
        "dtype": settings.dtype,
        "max-num-seqs": settings.max_num_seqs,
        "max-loras": slots,
        # The CPU tier must hold more adapters than the slots, or loading an adapter would evict a running one.
        "max-cpu-loras": max(settings.max_cpu_loras, 2 * slots),
        "max-lora-rank": max(manifest.serving_rank for manifest in manifests),
        "scheduler-cls": f"server.engine.admission.fair_scheduler.{scheduler}",
        "worker-extension-cls": "server.engine.fusing.manager.WorkerExtension",
        "tensor-parallel-size": settings.tensor_parallel_size,
        "generation-config": "vllm",  # ignore the sampling defaults in the model folder
        "api-server-count": 1,
    }
    if settings.max_model_len is not None:
        options["max-model-len"] = settings.max_model_len
    if settings.engine_gpu_share is not None and not on_cpu:
        options["gpu-memory-utilization"] = settings.engine_gpu_share
    # Routers drop the request option; the gateway reads the prompt length from the usage in every chunk.
    argv = [sys.executable, "-m", "server.engine", "--enable-lora", "--enable-force-include-usage"]
    for option, value in options.items():
        argv += [f"--{option}", str(value)]
    # Wrap only modules that a bank adapts: vLLM spends time on each wrapped module for every token.
    argv += ["--lora-target-modules", *sorted({module for m in manifests for module in m.target_modules})]
    # The engine needs only its own key; the gateway's secrets would let it map user keys to people.
    secrets = {f"MTA_{name.upper()}" for name, value in settings if isinstance(value, SecretStr)}
    environment = {name: value for name, value in os.environ.items() if name.upper() not in secrets} | {
        "VLLM_PLUGINS": PLUGIN,
        "VLLM_API_KEY": settings.engine_key.get_secret_value() if settings.engine_key else "",
        "VLLM_NO_USAGE_STATS": "1",
        "MTA_BANK": str(settings.bank),
        "MTA_CACHE_DIR": str(settings.cache_dir),
        "MTA_MAX_ADAPTER_NAMES": str(settings.max_adapter_names),
        "MTA_REDIS_URL": settings.redis_url,
        "MTA_DRAIN_S": str(settings.drain_s),
    }
    if settings.next_bank is not None:
        environment["MTA_NEXT_BANK"] = str(settings.next_bank)
    if settings.log_format == "json":
        environment["VLLM_LOGGING_CONFIG_PATH"] = str(VLLM_CONFIG)
    if settings.otlp_endpoint:
        argv += ["--otlp-traces-endpoint", settings.otlp_endpoint.rstrip("/") + TRACES_PATH]
        environment |= {
            "MTA_OTLP_ENDPOINT": settings.otlp_endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_SERVICE_NAME": "mta-engine",
            "OTEL_TRACES_SAMPLER": "parentbased_always_off",  # gateways decide which requests are traced
        }
    environment.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
    if share and on_cpu:
        cores = share.part(cores)
        argv = ["taskset", "--cpu-list", ",".join(map(str, cores)), *argv]
        environment["OMP_NUM_THREADS"] = str(_threads(environment.get("OMP_NUM_THREADS"), len(cores)))
    elif share:
        ranks = settings.tensor_parallel_size
        devices = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(share.count * ranks)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.part(devices)[:ranks])
    if on_cpu:
        argv.append("--enforce-eager")
        environment["TORCHDYNAMO_DISABLE"] = "1"  # otherwise vLLM compiles helper functions while a request waits
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(settings.kv_cache_gib)))
        if settings.tensor_parallel_size > 1:
            if "VLLM_CPU_OMP_THREADS_BIND" not in environment:
                environment |= _rank_binding(cores, settings.tensor_parallel_size, environment.get("OMP_NUM_THREADS"))
        else:
            argv += ["--distributed-executor-backend", "server.engine.cpu.executor.InProcessExecutor"]
            environment["LD_PRELOAD"] = preloads(environment.get("LD_PRELOAD", ""))
            environment.setdefault("OMP_NUM_THREADS", str(len(cores)))
    return argv, environment


def _threads(wanted: str | None, cores: int) -> int:
    return min(int(wanted), cores) if wanted and wanted.isdecimal() and int(wanted) else cores


def _rank_binding(cores: Sequence[int], ranks: int, threads: str | None) -> dict[str, str]:
    """Return the settings for threads and cores per rank (`0,1|2,3`); vLLM's default needs a NUMA node per rank.

    Do not bind if there are fewer threads than cores: a container with a CPU limit still sees all cores.
    """
    if (fewer := _threads(threads, len(cores))) < len(cores):
        return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, fewer // ranks))}
    shares = [cores[rank::ranks] or cores[:1] for rank in range(ranks)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, share)) for share in shares)}


def preloads(given: str) -> str:
    """Return the LD_PRELOAD that vLLM would use to spawn its core, in addition to `given`; import nothing."""
    libraries = [given] if given else []
    for package, pattern, alike in _PRELOADED:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.origin or any(name in library for library in libraries for name in alike):
            continue
        libraries += [str(path) for path in sorted(Path(spec.origin).parent.glob(pattern))[:1]]
    return ":".join(libraries)


def is_cpu_build() -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _slots_on_cpu(manifests: Sequence[BankManifest], number_bytes: int) -> int:
    fit = memory_bytes() // SLOT_MEMORY_DIVISOR // max(1, slot_bytes(manifests, number_bytes))
    return max(MIN_SLOTS, min(MAX_SLOTS, fit))


def slot_bytes(manifests: Sequence[BankManifest], number_bytes: int) -> int:
    """Return the size of one slot: A and B of all adapted modules at the highest serving rank, and their views."""
    rank = max(manifest.serving_rank for manifest in manifests)
    widths = {m.name: m.h_in + m.h_out for manifest in manifests for m in manifest.modules}
    return rank * sum(widths.values()) * number_bytes + len(widths) * VIEWS * VIEW_BYTES


def memory_bytes(limits: Sequence[Path] = MEMORY_LIMIT_FILES) -> int:
    """Return the memory available to this process: the machine's memory, or a lower container limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in limits:
        text = path.read_text().strip() if path.is_file() else ""
        memory = min(memory, int(text)) if text.isdigit() else memory
    return memory
