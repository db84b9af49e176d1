"""What few-shot adapting gains for people the bank does not know: the loss of later items, bytes, seconds.

For each person: the recipe of their first `--samples` items, by signature where the bank has such, a user adapter
trained on these items with the code that the worker runs, and the loss of their later items under the fused adapter
alone and with the user adapter. People must not be in the bank (`mta bank build --exclude`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from adapters.fusion import fuse
from adapters.training.adapt_config import AdaptConfig
from adapters.training.attached import attached
from adapters.training.loss import mean_loss
from adapters.user_adapter import UserAdapter, decode_user_adapter, stack
from bank.items.histories import read_excluded, read_histories
from bank.items.profile import item_text, profile_embedding
from bank.items.prompt import chat_messages, encode_pair
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.lookup.signature import MAX_ITEMS
from bank.manifest import read_manifest
from bank.models.folders import ensure_base_model, ensure_embedder
from bank.models.load import resolve_dtype
from bench import script
from bench.page.report import report
from bench.rig.subject import ModelOption
from server.settings import load_settings
from server.store.samples import Sample
from server.worker.training import AdapterTrainer

MAX_TOKENS = 512
LATER = 24
SETTINGS = ["2:8:1e-3:0.5", "2:8:1e-3:1"]


def main(
    *,
    bank: Annotated[Path, typer.Option(help="The bank; it must not know these people.")],
    users: Annotated[Path, typer.Option(help="People in the LaMP per-user layout.")],
    only: Annotated[Path | None, typer.Option(help="Only these people: the file given to --exclude.")] = None,
    samples: Annotated[int, typer.Option(help="How many first items to adapt to.", min=2)] = 10,
    people: Annotated[int, typer.Option(help="How many people.", min=2)] = 12,
    setting: Annotated[list[str] | None, typer.Option(help="`rank:steps:rate:strength`; may be repeated.")] = None,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the loss of later items, stacked less merged, with its 95 % interval over people."""
    manifest, settings = read_manifest(bank), load_settings(model=model)
    folder = ensure_base_model(settings.model, settings.cache_dir)
    trainer = AdapterTrainer.open(bank, manifest, folder, resolve_dtype("auto"))
    embedder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    lookup = ServingBank.open(bank, embedder.id)
    ids = read_excluded(only) if only else None
    chosen = [p for p in read_histories(users, lookup.task) if ids is None or p.user_id in ids][:people]
    configs = [_config(text) for text in setting or SETTINGS]
    readings: dict[str, list[dict[str, Any]]] = {_name(config): [] for config in configs}
    for person in track(chosen, f"{len(chosen)} people, {len(configs)} settings"):
        first = replace(person, items=person.items[:samples])
        later = replace(person, items=person.items[samples : samples + LATER])
        profile = profile_embedding(embedder.embed([item_text(item, lookup.task) for item in first.items]))
        pairs = first.pairs(lookup.task)
        signature = trainer.signature(pairs[-MAX_ITEMS:]) if lookup.signs else None
        taken = [Sample(chat_messages(turn), output) for turn, output in pairs]
        tests = [encode_pair(trainer.tokenizer, *pair, MAX_TOKENS) for pair in later.pairs(lookup.task)]
        fused = fuse(trainer.matrix, lookup.personalise(profile, signature).recipe, torch.float32)
        with attached(trainer.model, fused) as here:
            merged = mean_loss(here.model, tests)
        for config in configs:
            recipe = lookup.personalise(profile, signature, config.strength).recipe
            start_s = time.perf_counter()
            judgement = trainer.train(recipe, taken, config, first.items).finish()
            reading = {"merged": merged, "stacked": merged, "seconds": time.perf_counter() - start_s, "bytes": 0}
            reading |= {"steps": judgement.steps, "before": judgement.before, "after": judgement.after}
            if judgement.weights is not None:
                raw = trainer.encoded(recipe, judgement)
                user: UserAdapter = decode_user_adapter(manifest.layout, raw)
                beneath = fuse(trainer.matrix, recipe, torch.float32)
                with attached(trainer.model, stack(beneath, user, torch.float32)) as here:
                    reading |= {"stacked": mean_loss(here.model, tests), "bytes": len(raw)}
            readings[_name(config)].append(reading)
    rows = [(name, _row(taken)) for name, taken in readings.items()]
    report(f"{len(chosen)} people, {samples} samples each: stacked less merged, nats per token", rows, out, **readings)


def _row(readings: list[dict[str, Any]]) -> str:
    gains = [reading["stacked"] - reading["merged"] for reading in readings]
    half = 1.96 * stdev(gains) / len(gains) ** 0.5
    rejected = sum(not reading["bytes"] for reading in readings)
    return (
        f"{mean(gains):+.4f} ± {half:.4f} (merged {mean(r['merged'] for r in readings):.3f}), {rejected} rejected, "
        f"{max(reading['bytes'] for reading in readings) / 1024:.0f} KiB, "
        f"{mean(reading['seconds'] for reading in readings):.1f} s, "
        f"{mean(reading['steps'] for reading in readings):.0f} steps"
    )


def _config(text: str) -> AdaptConfig:
    rank, steps, rate, strength = text.split(":")
    return AdaptConfig(rank=int(rank), steps=int(steps), learning_rate=float(rate), strength=float(strength))


def _name(config: AdaptConfig) -> str:
    return f"rank {config.rank}, up to {config.steps} steps at {config.learning_rate:g}, strength {config.strength:g}"


if __name__ == "__main__":
    script(main)
