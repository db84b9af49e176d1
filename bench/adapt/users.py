"""Few-shot adaptation end to end: real users against a running `mta up`, and the gain for them.

For one user after the other, the benchmark posts the profile items as samples, waits for the job, and requests answers
to all queries. Then it scores the queries' gold answers in process: with the adapter of merged answers, and with the
promoted bytes on the recipe that they were trained on. A rejected adapter counts as merged. With a bank that has
signatures, the job is posted after the server has computed the user's signature.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import redis
import torch
import typer
from rich.progress import track

from adapters.fusion import fuse
from adapters.recipe import UserAdapterId, parse_recipe
from adapters.training.attached import attached
from adapters.training.loss import mean_loss
from adapters.user_adapter import decode_user_adapter, stack
from bank.evaluation.intervals import over_users
from bank.items.histories import History, read_histories
from bank.items.prompt import encode_pair
from bank.items.tasks import Task, get_task
from bank.manifest import read_manifest
from bank.models.folders import ensure_base_model
from bank.models.load import resolve_dtype
from bench import script
from bench.page.report import Spread, marked, report
from bench.rig.client import until_signed
from bench.rig.subject import ModelOption
from mta_client import Client, Personalization
from server.settings import load_settings
from server.store.jobs import parse_job_id
from server.worker.training import AdapterTrainer

MAX_TOKENS = 512


@dataclass(slots=True)
class Reading:
    """Readings of one user.

    Attributes:
        user_id: the user's id.
        state: final state of the job.
        seconds: time from POST to the first complete answer after the job's end.
        levels: levels of the answers to all queries.
        recipe: recipe of an answer without the user's adapter.
        adapter: the user adapter of the first answer, if any.
        beneath: recipe of that answer, on which the adapter was trained.
        raw: the promoted bytes; empty without an adapter.
        merged, stacked: loss of the gold answers in nats per token.
    """

    user_id: str
    state: str
    seconds: float = 0.0
    levels: list[str] = field(default_factory=list)
    recipe: str = ""
    adapter: UserAdapterId | None = None
    beneath: str = ""
    raw: bytes = b""
    merged: float = 0.0
    stacked: float = 0.0


def main(
    *,
    users: Annotated[Path, typer.Option(help="Users in the LaMP per-user layout, with their queries.")],
    bank: Annotated[Path, typer.Option(help="The server's bank.")],
    redis_url: Annotated[str, typer.Option(help="The server's store, for reading promoted adapters.")],
    url: Annotated[str, typer.Option(help="URL of the gateway.")] = "http://127.0.0.1:8000",
    people: Annotated[int, typer.Option(help="Maximum number of users.", min=2)] = 1000,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Adapt all users, generate, and score; exit status 1 if a job fails or an answer has the wrong level."""
    manifest, settings = read_manifest(bank), load_settings(model=model)
    task = get_task(manifest.task)
    persons = read_histories(users, task)[:people]
    queries = {person["user_id"]: person["query"] for person in json.loads(users.read_text(encoding="utf-8"))}
    readings = []
    with Client(url, timeout_s=600) as client, redis.Redis.from_url(redis_url) as store:
        for person in track(persons, "adapt, generate"):
            reading = _adapted(client, person, task)
            for query in queries[person.user_id]:
                reading.levels.append(_speaking(client, person.user_id, query["input"]).level)
            reading.raw = _promoted(store, reading.adapter)
            readings.append(reading)
    folder = ensure_base_model(settings.model, settings.cache_dir)
    trainer = AdapterTrainer.open(bank, manifest, folder, resolve_dtype("auto"))
    for reading in track(readings, "score the gold answers"):
        _score(trainer, reading, queries[reading.user_id])
    details = [{name: value for name, value in asdict(r).items() if name != "raw"} for r in readings]
    report(f"{len(persons)} users, their profiles as samples, {manifest.task}", _rows(readings), out, readings=details)


def _adapted(client: Client, person: History, task: Task) -> Reading:
    """Adapt one user from scratch, up to the first answer after the job."""
    samples = [{"input": turn, "output": output} for turn, output in person.pairs(task)]
    client.forget(person.user_id, missing_ok=True)
    client.put_profile(person.user_id, [{"id": item.id, **item.fields} for item in person.items])
    until_signed(client, [person.user_id])
    start_s = time.perf_counter()
    job = client.wait(client.adapt(person.user_id, samples).id)
    who = _speaking(client, person.user_id, samples[0]["input"])
    seconds = time.perf_counter() - start_s
    merged = _speaking(client, person.user_id, samples[0]["input"], personalize="merged")
    job_id = parse_job_id(job.id)
    assert job_id is not None
    adapter = UserAdapterId(job_id.user_key, job.adapter) if job.adapter and who.level == "stacked" else None
    assert merged.recipe
    beneath = who.recipe or ""
    return Reading(person.user_id, job.state, seconds, recipe=merged.recipe, adapter=adapter, beneath=beneath)


def _speaking(client: Client, user_id: str, prompt: str, personalize: str = "auto") -> Personalization:
    """Return the personalization of a short answer."""
    return client.generate(user_id, prompt, personalize=personalize, max_tokens=24, temperature=0).personalization


def _promoted(store: Any, adapter: UserAdapterId | None) -> bytes:
    """Return the stored bytes of an adapter; empty without one."""
    if adapter is None:
        return b""
    kept, raw = store.hmget(f"mta:{{{adapter.user_key}}}:adapter", ("id", "raw"))
    if kept.decode() != adapter.id:
        raise RuntimeError(f"{adapter} was served, but {kept.decode()} is stored")
    return bytes(raw)


def _score(trainer: AdapterTrainer, reading: Reading, queries: list[dict[str, str]]) -> None:
    """Compute the loss of the gold answers, merged and stacked."""
    golds = [encode_pair(trainer.tokenizer, query["input"], query["gold"], MAX_TOKENS) for query in queries]
    fused = fuse(trainer.matrix, parse_recipe(reading.recipe), torch.float32)
    with attached(trainer.model, fused) as here:
        reading.merged = reading.stacked = mean_loss(here.model, golds)
    if reading.raw:
        user = decode_user_adapter(trainer.manifest.layout, reading.raw)
        beneath = fuse(trainer.matrix, parse_recipe(reading.beneath), torch.float32)
        with attached(trainer.model, stack(beneath, user, torch.float32)) as here:
            reading.stacked = mean_loss(here.model, golds)


def _rows(readings: list[Reading]) -> list[tuple[str, object]]:
    """Return the rows of the report."""
    states = Counter(reading.state for reading in readings)
    promoted = [reading for reading in readings if reading.state == "succeeded"]
    served = all(level == ("stacked" if r.raw else "merged") for r in readings for level in r.levels)
    as_it_must = served and all(reading.raw for reading in promoted)
    merged = sum(reading.merged for reading in readings) / len(readings)
    sizes = [len(reading.raw) / 1024 for reading in promoted]
    return [
        ("jobs", marked(", ".join(f"{n} {state}" for state, n in states.items()), not states["failed"])),
        ("answers at level", marked(_levels(readings), as_it_must)),
        ("stacked less merged", f"{over_users([r.stacked - r.merged for r in readings])}, merged {merged:.4f}"),
        ("KiB per user", Spread.of(sizes) if sizes else "none was promoted"),
        ("seconds from POST to the first answer after it", Spread.of([r.seconds for r in readings])),
    ]


def _levels(readings: list[Reading]) -> str:
    return ", ".join(f"{n} {level}" for level, n in Counter(level for r in readings for level in r.levels).items())


if __name__ == "__main__":
    script(main)
