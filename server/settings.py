"""Every setting of every process, from `MTA_*` variables or options; `mta settings` prints them all."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters.errors import MtaError, excerpt

MAX_ITEM_BYTES = 64 << 10  # the largest item of a profile, as JSON
_OF_COMPOSE = ("MTA_ADMIN_KEY", "MTA_BANK_DIR", "MTA_GRAFANA_PORT", "MTA_PORT_2")  # what only docker-compose.yml reads


def _user_folder(variable: str, fallback: str) -> Path:
    """The XDG base folder named by `variable`, or its default under the home folder."""
    return Path(os.environ.get(variable) or Path.home() / fallback) / "mta"


class Settings(BaseSettings):
    """Each field's variable is `MTA_` plus its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="MTA_", frozen=True, extra="ignore")

    # What is served
    bank: Path | None = Field(None, description="Folder of the bank (`mta bank build --out`).")
    next_bank: Path | None = Field(None, description="A second bank that engines serve while a fleet moves to it.")
    model: str = Field("default", description="Base model: folder, hub id or `default` (SmolLM2-135M-Instruct).")
    embedder: Path | None = Field(None, description="Folder with model.onnx and tokenizer.json; MiniLM by default.")
    cache_dir: Path = Field(
        default_factory=lambda: _user_folder("XDG_CACHE_HOME", ".cache"),
        description="Where prepared default models are kept; can be deleted at any time.",
    )
    data_dir: Path = Field(
        default_factory=lambda: _user_folder("XDG_DATA_HOME", ".local/share"),
        description="Where `mta up` keeps Valkey's files and the secret; survives restarts.",
    )
    store_mib: int | None = Field(None, ge=16, description="Most that `mta up` stores, MiB; else an eighth of memory.")

    # Gateway
    host: str = Field("127.0.0.1", description="Address the gateway listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port the gateway listens on.")
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis 7.2+ or Valkey 8+; redis+cluster:// and some hosts of a cluster, comma-separated; "
        "redis+sentinel:// and the Sentinels, comma-separated, then /service.",
    )
    require_durable_store: bool = Field(
        True, description="Refuse a Redis that may lose acknowledged writes; false: warn, and say so in /ready."
    )
    secret: SecretStr | None = Field(
        None, description="Keys the hash of user ids; the same for all gateways, never changed. `mta up` makes one."
    )
    tenant: str = Field("default", description="Tenant that all users belong to while no API key exists.")
    engine_url: str = Field("http://127.0.0.1:8001", description="vLLM that generates, or the router before several.")
    engine_urls: str = Field("", description="Every engine's URL, comma-separated, for status; engine_url if empty.")
    engine_key: SecretStr | None = Field(None, description="Key that engines require. `mta up` makes one.")
    engine_timeout_s: float = Field(600, gt=0, description="Longest silence of the engine within one answer.")
    max_requests: int = Field(
        512, gt=0, description="Most requests in progress, one key's half; others get 503 or 429."
    )
    send_timeout_s: float = Field(60, gt=0, description="Longest time that a client may take nothing of an answer.")
    engine_places: int | None = Field(
        None, ge=1, description="Most sequences of this gateway in the engines; else its share of batches and slots."
    )
    queue_places: int | None = Field(
        None, ge=0, description="Most generations that wait for the engines; others get 429. Else half the places."
    )
    queue_timeout_s: float = Field(10, gt=0, description="Longest wait for the engines; X-Queue-Timeout shortens it.")
    max_prompt_chars: int = Field(200_000, gt=0, description="Longest prompt, in characters.")
    key_requests: int = Field(0, ge=0, description="Requests a minute of each API key; 0 for any number.")
    key_tokens: int = Field(0, ge=0, description="Tokens a minute of each API key, prompts included; 0 for any number.")
    key_concurrent: int = Field(0, ge=0, description="Requests at once of each API key; 0 for any number.")
    key_jobs: int = Field(0, ge=0, description="Adapt jobs a day of each API key; 0 for any number.")
    user_requests: int = Field(0, ge=0, description="Requests a minute of each user; 0 for any number.")
    user_tokens: int = Field(0, ge=0, description="Tokens a minute of each user, prompts included; 0 for any number.")
    user_jobs: int = Field(0, ge=0, description="Adapt jobs a day of each user; 0 for any number.")
    profile_items: int = Field(512, gt=0, le=4096, description="Newest items kept of each user.")
    profile_bytes: int = Field(2 << 20, ge=MAX_ITEM_BYTES, description="Most bytes kept of a user's items, as JSON.")
    history_cache_mib: int = Field(64, ge=0, description="Histories kept ready for prompts, MiB; 0 reads them anew.")
    job_tokens: int = Field(2_000_000, gt=0, description="Most tokens that an adapt job reads; an hour on two cores.")
    job_seconds: int = Field(3600, gt=0, description="Longest time that a worker trains one adapt job.")

    # Watching
    metrics_tenants: str = Field(
        "", description="Tenants that metrics name, comma-separated, besides MTA_TENANT; others are `other`."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Metrics of a worker (0: none) or a router (0: 29000).")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people, or an object each.")
    otlp_endpoint: str = Field("", description="Collector of traces, by OTLP over HTTP, e.g. http://127.0.0.1:4318.")
    trace_share: float = Field(1.0, ge=0, le=1, description="Share of requests traced, where clients do not decide.")

    # Commands that call a gateway
    api_key: SecretStr | None = Field(None, description="API key that they send; `mta keys create` makes one.")
    first_key: SecretStr | None = Field(
        None, description="The operator's own first key, for `mta keys create --given`."
    )

    # Engine
    inner_host: str = Field("127.0.0.1", description="Address of engine, router, worker's metrics; never a public one.")
    engine_port: int = Field(8001, ge=0, le=65535, description="Port the engine listens on.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Weights and KV cache.")
    max_loras: int | None = Field(
        None,
        ge=1,
        description="Adapter slots: recipes that a batch can mix. By default as many as a batch holds requests; on CPU "
        "as fit a sixteenth of the memory, 8 to 64.",
    )
    max_cpu_loras: int = Field(64, ge=1, description="Fused adapters kept in the worker, slots included.")
    max_adapter_names: int = Field(1024, ge=1, description="Idle recipes whose ids the engine remembers.")
    max_model_len: int | None = Field(None, gt=0, description="Context in tokens; the model's own by default.")
    max_num_seqs: int = Field(32, ge=1, description="Requests that one batch can hold.")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache on CPU, GiB; vLLM takes whole ones, at least 1.")
    engine_gpu_share: float | None = Field(
        None, gt=0, lt=1, description="Share of a GPU's memory for an engine; else `mta up`'s plan, or vLLM's own."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Devices (on CPU: processes) one engine spans.")

    # Fleet
    replicas: int = Field(1, ge=1, description="Engines that `mta up` starts; from two on behind a router.")
    router_port: int = Field(8002, ge=0, le=65535, description="Port the router listens on.")
    drain_s: float = Field(30, ge=0, description="How long gateway and engine finish what they have begun at a stop.")

    # Worker
    worker_threads: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="Training threads; all cores by default.",
    )
    worker_gpu_share: float | None = Field(
        None, ge=0, lt=1, description="Most of the GPU's memory that training takes; 0: the CPU; else `mta up`'s plan."
    )
    worker_niceness: int = Field(0, ge=0, le=19, description="Niceness of `mta up`'s worker; at 10 answers go first.")

    def bank_folder(self) -> Path:
        """The bank's folder; raises MtaError when no bank was named."""
        if self.bank is None:
            raise MtaError("no bank was named: give its folder, or set MTA_BANK; `mta bank build` makes one")
        return self.bank

    @property
    def banks(self) -> tuple[Path, ...]:
        """The folders of the banks an engine serves; raises MtaError when no first bank was named."""
        return (self.bank_folder(), *([self.next_bank] if self.next_bank else []))

    @property
    def named_tenants(self) -> frozenset[str]:
        return frozenset({self.tenant, *filter(None, map(str.strip, self.metrics_tenants.split(",")))})

    @property
    def engines(self) -> tuple[str, ...]:
        urls = tuple(url.strip().rstrip("/") for url in self.engine_urls.split(",") if url.strip())
        return urls or (self.engine_url.rstrip("/"),)


def load_settings(**given: object) -> Settings:
    """Settings from the environment, overridden by `given`, where None means not given.

    Raises `MtaError`, which names a variable that is no setting or whose value makes no sense.
    """
    known = {f"MTA_{name.upper()}" for name in Settings.model_fields}
    for name in map(str.upper, os.environ):
        if name.startswith("MTA_") and name not in known.union(_OF_COMPOSE):
            nearest = get_close_matches(name, sorted(known), 1, cutoff=0)[0]
            raise MtaError(f"{name} is no setting; the nearest is {nearest}. Unset it, or set that one instead")
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        variable = f"MTA_{first['loc'][0]}".upper() if first["loc"] else "MTA_*"
        shown = "" if "secret" in variable.lower() or "key" in variable.lower() else f", got {excerpt(first['input'])}"
        raise MtaError(f"{variable}: {first['msg']}{shown} (`mta settings` lists all)") from None
