"""Measure how long new people wait for their signature while the worker has a full queue of adapt jobs.

Starts a Valkey and a worker, fills the queue with jobs, and lets people arrive at a steady pace; each is written to the
store as a gateway does it, which also asks for the signature. A person waits from the end of that write until the
signature is in their record.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from adapters.errors import MtaError
from adapters.training.adapt_config import default_config
from bank.items.profile import parse_item
from bank.items.tasks import get_task
from bank.manifest import BankManifest, read_manifest
from bank.models.folders import ensure_embedder
from bench import script
from bench.page.report import Figures, percentile, tabulate
from bench.rig.processes import mta, running, sleep_until
from bench.rig.subject import TINY_CONTEXT, BankOption, ModelOption, Subject, TinyOption, configured_subject
from bench.rig.tiny import tiny_bank, tiny_model
from bench.rig.valkey import ValkeyProcess
from bench.serving.front import SECRET, WORDS
from server.settings import Settings, load_settings
from server.store.jobs import Submission
from server.store.opening import Stores, open_stores
from server.store.profile_record import Profile, StoredItem
from server.store.profiles import Change
from server.store.samples import MAX_SAMPLES, Sample, encode_config, encode_sample
from server.store.tenants.user_key import UserKeys

ITEMS, SAMPLES, WORDS_EACH = 8, 10, 32
PATIENCE_S = 600.0
POLL_S = 0.05
COLUMNS = ("people", "seconds until the signature: median", "p99", "slowest", "jobs that ended", "jobs left")


def main(
    *,
    bank: BankOption = None,
    model: ModelOption = None,
    tiny_model: TinyOption = False,
    people: Annotated[int, typer.Option(help="Number of people who arrive.", min=2)] = 100,
    every_s: Annotated[float, typer.Option(help="Seconds between two arrivals.", min=0)] = 5.0,
    jobs: Annotated[int, typer.Option(help="Jobs in the queue at the start.", min=2)] = 100,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the time from a new profile to its signature beside a full queue of jobs."""
    with tempfile.TemporaryDirectory() as scratch:
        subject = _tiny(Path(scratch)) if tiny_model else configured_subject(bank, model)
        if not (subject.manifest.has_signatures and subject.manifest.room):
            raise MtaError(f"the bank at {subject.bank} has no signatures, or no rank for users: use another")
        with ValkeyProcess(Path(scratch) / "valkey") as store:
            folders = {"MTA_BANK": str(subject.bank), "MTA_MODEL": str(subject.model)}
            with running(mta("worker"), folders | {"MTA_REDIS_URL": store.url}) as worker:
                worker.wait_for("ready: bank", PATIENCE_S)
                waits_s, left = asyncio.run(_measure(store.url, subject.manifest, people, every_s, jobs))
    if not left:
        raise MtaError(f"all {jobs} jobs ended before the last person was signed: give more --jobs")
    title = f"{subject.title}: signatures beside a full queue of jobs, somebody every {every_s:g} s"
    found = [percentile(waits_s, share) for share in (0.5, 0.99, 1.0)]
    tabulate([Figures(title, COLUMNS, [[people, *found, jobs - left, left]])], out, bench="signing", readings=waits_s)


def _tiny(scratch: Path) -> Subject:
    settings, model = load_settings(), tiny_model(scratch / "tiny", context=TINY_CONTEXT)
    embedder = ensure_embedder(settings.embedder, settings.cache_dir)
    bank = tiny_bank(scratch / "bank", model, embedder, anchors=16, signs=True)
    return Subject(bank, model, read_manifest(bank))


async def _measure(url: str, manifest: BankManifest, people: int, every_s: float, jobs: int) -> tuple[list[float], int]:
    """Return everyone's wait in seconds, and how many jobs had not ended by then."""
    async with open_stores(Settings(redis_url=url)) as stores:
        signing = stores.signing(manifest.short)
        config = encode_config(default_config(manifest.room))
        for number in range(jobs):
            pairs = _pairs(number, SAMPLES)
            samples = [encode_sample(Sample([{"role": "user", "content": turn}], text)) for turn, text in pairs]
            user_key = await _add(stores, manifest, f"trained-{number}", number)
            await stores.jobs.submit(user_key, Submission(samples, False, config, manifest.short), MAX_SAMPLES)

        async def arrive(number: int) -> float:
            await sleep_until(start_s + number * every_s)
            user_key = await _add(stores, manifest, f"new-{number}", jobs + number)
            await signing.add(user_key)
            since_s = time.perf_counter()
            async with asyncio.timeout(PATIENCE_S):
                while not await _is_signed(stores, user_key, manifest.short):  # noqa: ASYNC110 - no event
                    await asyncio.sleep(POLL_S)
            return time.perf_counter() - since_s

        while (backlog := await stores.jobs.backlog(manifest.short)).waiting == backlog.open:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)  # until the worker has begun with the first job
        start_s = time.perf_counter()
        waits_s = await asyncio.gather(*map(arrive, range(people)))
        return waits_s, (await stores.jobs.backlog(manifest.short)).open


async def _is_signed(stores: Stores, user_key: str, bank: str) -> bool:
    profile = await stores.profiles.load(user_key)
    return profile is not None and profile.is_signed(bank)


async def _add(stores: Stores, manifest: BankManifest, name: str, seed: int) -> str:
    """Store a person with some items; return their key."""
    task = get_task(manifest.task)
    pairs = [{"input": turn, "output": text} for turn, text in _pairs(seed, ITEMS)]
    items = [parse_item(pair, task, place) for place, pair in enumerate(pairs)]
    embedding = np.eye(manifest.embedder.dim, dtype=np.float32)[0]
    profile = Profile(name, len(items), 1, manifest.embedder.id, embedding)
    stored = {item.id: StoredItem(place, item.fields) for place, item in enumerate(items)}
    user_key = UserKeys(SECRET, Settings().tenant).key(name)
    epoch = await stores.profiles.begin(user_key)
    await stores.profiles.commit(user_key, b"", Change(profile, stored, {}, ()), epoch)
    return user_key


def _pairs(seed: int, count: int) -> list[tuple[str, str]]:
    chance = random.Random(seed)
    return [
        (f"Write about {chance.choice(WORDS)} {n}.", " ".join(chance.choices(WORDS, k=WORDS_EACH)))
        for n in range(count)
    ]


if __name__ == "__main__":
    script(main)
