"""All settings of all processes, from `MTA_*` variables or options; `mta settings` lists them."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, FilePath, Json, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters.errors import MtaError, excerpt
from adapters.training.adapt_config import MAX_SAMPLE_TOKENS

MAX_INT32 = (1 << 31) - 1  # largest token id and token count: engines use 32-bit integers
MAX_ITEM_BYTES = 64 << 10  # maximum size of a profile item, as JSON
_COMPOSE_ONLY = ("MTA_ADMIN_KEY", "MTA_BANK_DIR", "MTA_GRAFANA_PORT", "MTA_PORT_2")  # read only by docker-compose.yml
GROUPS = {
    "bank": "What is served",
    "host": "Gateway",
    "metrics_tenants": "Watching",
    "api_key": "Commands that call a gateway",
    "inner_host": "Engine",
    "replicas": "Fleet",
    "adapter_versions": "Worker",
}
"""Titles of the settings' groups, by the first setting of each."""
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110, section 5.6.2


def _user_folder(variable: str, fallback: str) -> Path:
    """Return our folder in the XDG base folder of `variable`, which defaults to `fallback` in the home folder."""
    return Path(os.environ.get(variable) or Path.home() / fallback) / "mta"


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


class Sampling(BaseModel, frozen=True, extra="forbid"):
    """How tokens are drawn; None means not set."""

    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Only the likeliest tokens of this total probability.")
    top_k: int | None = Field(None, ge=0, le=MAX_INT32, description="Only so many of the likeliest tokens; 0: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Only tokens this likely, relative to the likeliest.")
    repetition_penalty: float | None = Field(None, gt=0, le=2, description="Above 1: repeat less.")

    def __str__(self) -> str:
        return self.model_dump_json(exclude_none=True)


class Settings(BaseSettings):
    """A field's variable is `MTA_` plus its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="MTA_", frozen=True, extra="ignore")

    bank: Path | None = Field(None, description="Folder of the bank (`mta bank build --out`).")
    next_bank: Path | None = Field(None, description="Second bank that engines serve while a fleet moves to it.")
    model: str = Field("default", description="Base model: folder, hub id or `default` (SmolLM2-135M-Instruct).")
    chat_template: FilePath | None = Field(
        None, description="File with a chat template in place of the base model's, as when the bank was built."
    )
    embedder: Path | None = Field(None, description="Folder with model.onnx and tokenizer.json; default: MiniLM.")
    cache_dir: Path = Field(
        default_factory=lambda: _user_folder("XDG_CACHE_HOME", ".cache"),
        description="Folder for prepared default models; can be deleted at any time.",
    )
    data_dir: Path = Field(
        default_factory=lambda: _user_folder("XDG_DATA_HOME", ".local/share"),
        description="Folder where `mta up` keeps Valkey's files and the secret; must survive restarts.",
    )
    store_mib: int | None = Field(
        None, ge=16, description="Memory limit of `mta up`'s store in MiB; default: an eighth of memory."
    )

    host: str = Field("127.0.0.1", description="Address the gateway listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port the gateway listens on.")
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="URL of Redis 7.2+ or Valkey 8+; for a cluster, redis+cluster:// and comma-separated hosts; for "
        "Sentinel, redis+sentinel:// and comma-separated Sentinels, then /service.",
    )
    require_durable_store: bool = Field(
        True, description="Reject a Redis that may lose acknowledged writes; false: only warn, also in /ready."
    )
    secret: SecretStr | None = Field(
        None,
        description="Key of the user id hash, equal on all gateways; `NEW,OLD` while `mta secret rotate` exchanges it. "
        "`mta up` creates one.",
    )
    tenant: str = Field("default", description="Tenant of all users while no API key exists.")
    engine_url: str = Field("http://127.0.0.1:8001", description="URL of the engine, or of the router for several.")
    engine_urls: str = Field("", description="URLs of all engines, comma-separated, for status; default: engine_url.")
    engine_key: SecretStr | None = Field(
        None, description="Key that engines require; `NEW,OLD`: gateways send the first. `mta up` creates one."
    )
    engine_timeout_s: float = Field(600, gt=0, description="Maximum silence of the engine during an answer, seconds.")
    max_requests: int = Field(
        512, gt=0, description="Maximum requests in progress, half for one key; others get 503 or 429."
    )
    send_timeout_s: float = Field(60, gt=0, description="Longest time a client may stop reading a response, seconds.")
    engine_places: int | None = Field(
        None, ge=1, description="This gateway's maximum sequences in the engines; default: its share of their capacity."
    )
    queue_places: int | None = Field(
        None, ge=0, description="Maximum generations in the queue; others get 429. Default: half the engine places."
    )
    queue_timeout_s: float = Field(10, gt=0, description="Longest queue time, seconds; X-Queue-Timeout shortens it.")
    user_headers: str = Field(
        "X-User-ID",
        description="Headers that may name the user on OpenAI's routes, comma-separated; the first that is not empty "
        "counts.",
    )
    chat_template_kwargs: str = Field(
        "enable_thinking,thinking",
        description="Arguments of the chat template that requests may set (`chat_template_kwargs`), comma-separated.",
    )
    default_max_tokens: int = Field(
        1024, ge=1, le=MAX_INT32, description="Maximum tokens of an answer whose request sets none, if they fit."
    )
    max_prompt_chars: int = Field(200_000, gt=0, description="Maximum length of a prompt, in characters.")
    key_requests: int = Field(0, ge=0, description="Requests a minute per API key; 0: no limit.")
    key_tokens: int = Field(0, ge=0, description="Tokens a minute per API key, prompts included; 0: no limit.")
    key_concurrent: int = Field(0, ge=0, description="Concurrent requests per API key; 0: no limit.")
    key_jobs: int = Field(0, ge=0, description="Adapt jobs a day per API key; 0: no limit.")
    user_requests: int = Field(0, ge=0, description="Requests a minute per user; 0: no limit.")
    user_tokens: int = Field(0, ge=0, description="Tokens a minute per user, prompts included; 0: no limit.")
    user_jobs: int = Field(0, ge=0, description="Adapt jobs a day per user; 0: no limit.")
    holdout: float = Field(
        0, ge=0, le=0.5, description="Share of users answered one level lower each week, for comparison; 0: none."
    )
    refresh_samples: int = Field(
        0, ge=0, description="Adapt a user again after so many texts sent instead of answers; 0: only when asked."
    )
    refresh_hours: float = Field(24, ge=0, description="Shortest time between two jobs of a user for that, hours.")
    profile_items: int = Field(512, gt=0, le=4096, description="Maximum items per user; the newest are kept.")
    profile_bytes: int = Field(2 << 20, ge=MAX_ITEM_BYTES, description="Maximum bytes of a user's items, as JSON.")
    keep_texts: bool = Field(
        True, description="Whether users' texts stay stored; false: only until signed, or their job ends."
    )
    sample_tokens: int = Field(
        MAX_SAMPLE_TOKENS,
        gt=0,
        description="Maximum tokens of a sample; `mta up` lowers it to what its plan leaves the worker of a GPU.",
    )
    job_tokens: int = Field(2_000_000, gt=0, description="Maximum tokens an adapt job reads; an hour on two cores.")
    job_seconds: int = Field(3600, gt=0, description="Longest training time of an adapt job, seconds.")

    metrics_tenants: str = Field(
        "", description="Tenants with metrics of their own, comma-separated, besides MTA_TENANT; others are `other`."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Metrics port: worker (0: none), router (0: 29000).")
    log_format: Literal["text", "json"] = Field("text", description="Log format: plain text, or a JSON object a line.")
    audit: Path | None = Field(
        None,
        description="File for the audit log: erasures, exports, keys, copies and the like; by default none, of `mta "
        "up` `audit.jsonl` in its data folder.",
    )
    otlp_endpoint: str = Field("", description="Trace collector, OTLP over HTTP, e.g. http://127.0.0.1:4318.")
    trace_share: float = Field(1.0, ge=0, le=1, description="Share of requests traced if the client does not decide.")

    api_key: SecretStr | None = Field(None, description="API key to send; `mta keys create` creates one.")
    first_key: SecretStr | None = Field(None, description="The operator's first key, for `mta keys create --given`.")
    drafts_key: SecretStr | None = Field(None, description="Key of the server that `mta bank drafts` asks.")

    inner_host: str = Field("127.0.0.1", description="Address of engine, router, worker metrics; never a public one.")
    engine_port: int = Field(8001, ge=0, le=65535, description="Port the engine listens on.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Weights and KV cache.")
    max_loras: int | None = Field(
        None,
        ge=1,
        description="Adapter slots: recipes that a batch can mix. Default: max_num_seqs; on CPU, the number that fits "
        "a sixteenth of the memory, 8 to 64.",
    )
    max_cpu_loras: int = Field(64, ge=1, description="Maximum fused adapters in the worker's memory, slots included.")
    max_model_len: int | None = Field(None, gt=0, description="Context length in tokens; default: the model's own.")
    default_sampling: Json[Sampling] | None = Field(
        None,
        description="Sampling if a request sets none: temperature, top_p, top_k, min_p, repetition_penalty, as JSON. "
        "Default: the model's generation_config.json; for the default model temperature 0.2 and top_p 0.9.",
    )
    canary: bool = Field(True, description="Whether an engine starts only if adapters act as when the bank was built.")
    tool_parser: str | None = Field(
        None, description="vLLM's parser of tool calls, or `none`; default: what the model's chat template asks for."
    )
    reasoning_parser: str | None = Field(
        None, description="vLLM's parser of reasoning, which then stands beside an answer's content."
    )
    max_num_seqs: int = Field(32, ge=1, description="Maximum requests in a batch.")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache on CPU, GiB; vLLM uses whole GiB, at least 1.")
    engine_gpu_share: float | None = Field(
        None, gt=0, lt=1, description="An engine's share of a GPU's memory; default: `mta up`'s plan, or vLLM's own."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Devices (on CPU: processes) per engine.")

    replicas: int = Field(1, ge=1, description="Engines that `mta up` starts; two or more run behind a router.")
    router_port: int = Field(8002, ge=0, le=65535, description="Port the router listens on.")
    drain_s: float = Field(30, ge=0, description="Seconds for gateway and engine to finish open requests at shutdown.")

    adapter_versions: int = Field(3, ge=1, description="Maximum versions kept of a user's adapter, the served one too.")
    worker_threads: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="Training threads; default: all cores.",
    )
    worker_gpu_share: float | None = Field(
        None, ge=0, lt=1, description="Maximum share of GPU memory for training; 0: use CPU; default: `mta up`'s plan."
    )
    worker_niceness: int = Field(0, ge=0, le=19, description="Niceness of `mta up`'s worker; 10 favours generations.")

    @field_validator("user_headers")
    @classmethod
    def _check_header_names(cls, value: str) -> str:
        if not (names := _listed(value)) or not all(map(_HEADER_NAME.fullmatch, names)):
            raise PydanticCustomError("header_names", "must be names of HTTP headers, comma-separated")
        return value

    def bank_folder(self) -> Path:
        """Return the bank's folder; raise `MtaError` if it is not set."""
        if self.bank is None:
            raise MtaError("no bank is set: give its folder, or set MTA_BANK; `mta bank build` creates one")
        return self.bank

    @property
    def banks(self) -> tuple[Path, ...]:
        """The folders of the banks an engine serves; raises `MtaError` if the first one is not set."""
        return (self.bank_folder(), *([self.next_bank] if self.next_bank else []))

    @property
    def named_tenants(self) -> frozenset[str]:
        return frozenset({self.tenant, *_listed(self.metrics_tenants)})

    @property
    def user_header_names(self) -> tuple[str, ...]:
        return _listed(self.user_headers)

    @property
    def template_arguments(self) -> tuple[str, ...]:
        return _listed(self.chat_template_kwargs)

    @property
    def user_secret(self) -> str | None:
        return self.secret.get_secret_value() if self.secret else None

    @property
    def engine_keys(self) -> tuple[str, ...]:
        return _listed(self.engine_key.get_secret_value()) if self.engine_key else ()

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(url.rstrip("/") for url in _listed(self.engine_urls) or (self.engine_url,))


def load_settings(**given: object) -> Settings:
    """Load the settings from the environment; values in `given` other than None take precedence.

    Raise `MtaError` if an `MTA_` variable is not a setting or a value is invalid.
    """
    known = {f"MTA_{name.upper()}" for name in Settings.model_fields}
    for name in map(str.upper, os.environ):
        if name.startswith("MTA_") and name not in known.union(_COMPOSE_ONLY):
            nearest = get_close_matches(name, sorted(known), 1, cutoff=0)[0]
            raise MtaError(f"{name} is not a setting. Did you mean {nearest}? Unset {name}, or rename it")
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        field, *inside = first["loc"] or ("*",)
        variable = ".".join([f"MTA_{field}".upper(), *map(str, inside)])
        shown = "" if "secret" in variable.lower() or "key" in variable.lower() else f", got {excerpt(first['input'])}"
        raise MtaError(f"{variable}: {first['msg']}{shown} (`mta settings` lists all)") from None
