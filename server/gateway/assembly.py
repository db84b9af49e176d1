"""What a gateway has for each bank that it serves, put together from what all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from server.gateway.access.limiter import Limiter
from server.gateway.access.queue import EngineQueue
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import EngineClient
from server.gateway.engines.tokenizer import TokenizerClient
from server.gateway.generation.generator import Generator
from server.gateway.generation.index_cache import IndexCache
from server.gateway.generation.indexing import Indexing
from server.gateway.generation.personalizer import Personalizer
from server.gateway.generation.recall import Recall
from server.gateway.operating.health import Health
from server.gateway.operating.metrics import Metrics
from server.gateway.parts import Parts
from server.gateway.users.adapting import Adapting
from server.gateway.users.erasing import Erasing
from server.gateway.users.exporting import Exporting
from server.gateway.users.history import HistoryLimit
from server.gateway.users.profiles import Profiles
from server.gateway.users.sample_checks import SampleChecks
from server.settings import MAX_ITEM_BYTES, Settings
from server.store.opening import Stores
from server.store.samples import JobBudget
from server.store.tenants.user_key import Tenants
from server.watching.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Shared:
    """What a gateway has once, however many banks it serves."""

    settings: Settings
    tenants: Tenants
    stores: Stores
    embedder: Embedder
    embedding: Executor
    engine: EngineClient
    engines: Engines
    tokenizer: TokenizerClient
    limiter: Limiter
    queue: EngineQueue
    health: Health
    metrics: Metrics
    tracing: Tracing


def parts_over(banks: Mapping[Path, ServingBank], shared: Shared) -> dict[str, Parts]:
    """A gateway's parts over each bank, by its 8 hex digits.

    Args:
        banks: by folder; at least one.
        shared: what all of them use.
    """
    history_bytes = (shared.settings.history_cache_mib << 20) // len(banks)
    return {bank.manifest.short: _parts(folder, bank, shared, history_bytes) for folder, bank in banks.items()}


def _parts(folder: Path, bank: ServingBank, shared: Shared, history_bytes: int) -> Parts:
    settings, stores = shared.settings, shared.stores
    signing = stores.signing(bank.manifest.short) if bank.signs else None
    profiles = Profiles(
        stores.profiles,
        embedder=shared.embedder,
        task=bank.task,
        executor=shared.embedding,
        limit=HistoryLimit(settings.profile_items, settings.profile_bytes),
        signing=signing,
    )
    personalizer = Personalizer(bank, profiles)
    generator = Generator(
        personalizer,
        Recall(
            bank.task,
            shared.tokenizer,
            Indexing(profiles, bank.task, IndexCache(history_bytes)),
            settings.queue_timeout_s,
        ),
        shared.engine,
        shared.engines,
        limiter=shared.limiter,
        queue=shared.queue,
        max_prompt_chars=settings.max_prompt_chars,
        metrics=shared.metrics,
    )
    adapting = Adapting(
        stores.jobs,
        profiles,
        checks=SampleChecks(shared.tokenizer, lambda: shared.engines.context),
        manifest=bank.manifest,
        task=bank.task,
        max_sample_bytes=MAX_ITEM_BYTES,
        budget=JobBudget(settings.job_tokens, settings.job_seconds),
        tracing=shared.tracing,
    )
    erasing = Erasing(
        stores.profiles,
        adapters=stores.adapters,
        jobs=stores.jobs,
        signing=stores.signing,
        bank=bank.manifest.short,
        log_file=stores.file,
        drop=shared.engines.drop,
    )
    exporting = Exporting(
        stores.profiles, jobs=stores.jobs, adapters=stores.adapters, bank=folder, manifest=bank.manifest
    )
    return Parts(
        settings=settings,
        tenants=shared.tenants,
        bank=bank,
        profiles=profiles,
        adapting=adapting,
        erasing=erasing,
        exporting=exporting,
        personalizer=personalizer,
        generator=generator,
        limiter=shared.limiter,
        health=shared.health,
        metrics=shared.metrics,
        tracing=shared.tracing,
    )
