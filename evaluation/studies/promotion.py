"""Measure what promotion is worth: few-shot adapters of people outside the bank, judged as a worker judges them.

    python -m evaluation.studies.promotion
    python -m evaluation.studies.promotion --bank BANK --users DATA/mail/anchors.json --only OUTSIDE.json

A person's last items are unseen; the 2, 4, 8 or 16 before them are profile and samples, as of a user whose first
request is `POST /users/{id}/adapt`. The unseen items' loss with a promoted adapter is compared with that of the merged
adapter, which this user is served without it. Without `--bank` the bank is the demo's, and people answer its questions
in another person's manner.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.recipe import FusionRecipe
from adapters.training.adapt_config import AdaptConfig, default_config
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.loss import mean_loss
from adapters.user_adapter import UserAdapter, stack
from bank.building.selection import mean_embedding
from bank.errors import BankError
from bank.items.histories import History, read_excluded, read_histories
from bank.items.prompt import chat_messages, encode_pair
from bank.lookup.embedder import Embedder
from bank.lookup.phrases import as_served
from bank.lookup.serving import ServingBank
from bank.lookup.signature import Signature
from bank.models.folders import ensure_base_model, ensure_embedder
from bank.models.load import resolve_dtype
from bench import script
from bench.page.report import console, report
from bench.rig.people import write_people
from demo.bank import cached_bank
from demo.manners import MANNERS
from demo.personas import anchors, worlds
from evaluation.intervals import over_users
from evaluation.studies import mta
from server.settings import Settings, load_settings
from server.store.samples import Sample
from server.worker.training import AdapterTrainer, JobUser, pairs_of

MAX_TOKENS = 512  # of an unseen item
OUTSIDERS = ("Robin", "Sam")  # names; two in each manner and world


@dataclass(frozen=True, slots=True)
class Outcome:
    """One person's adapter."""

    count: int  # number of samples
    is_promoted: bool
    gain: float  # loss of the unseen items with the merged adapter less that with the new one, nats per token


def main(
    *,
    bank: Annotated[Path | None, typer.Option(help="A bank that none of the people is in.", exists=True)] = None,
    users: Annotated[Path | None, typer.Option(help="The people, in LaMP's per-user layout.", exists=True)] = None,
    only: Annotated[Path | None, typer.Option(help="Only these people: a file of ids.", exists=True)] = None,
    counts: Annotated[str, typer.Option("--samples", help="Numbers of samples.")] = "2,4,8,16",
    unseen: Annotated[int, typer.Option(help="Unseen items of each person.", min=1)] = 8,
    strength: Annotated[float | None, typer.Option(help="Strength beneath.", show_default="the default")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Train, judge, and compare with what is served."""
    if (bank is None) != (users is None):
        raise typer.BadParameter("give both, or neither for the demo's", param_hint="--bank, --users")
    torch.set_num_threads(1)
    settings = load_settings()
    if bank is None or users is None:
        bank = cached_bank(anchors(), settings.cache_dir, mta)
        users = outsiders(settings.cache_dir / "demo" / "outside.json")
    gate = Gate.open(bank, settings, strength)
    people = read_histories(users, gate.trainer.task, queries=False)
    if only:
        kept = read_excluded(only)
        people = [person for person in people if person.user_id in kept]
    wanted = [(person, int(count)) for count in counts.split(",") for person in people]
    able = [(person, count) for person, count in wanted if len(person.pairs(gate.trainer.task)) >= count + unseen]
    if not able:
        raise BankError(
            f"nobody in {users} has {unseen} items and {counts} samples before them: choose smaller numbers"
        )
    tried = [gate.outcome(*one, unseen) for one in track(able, "training", console=console())]
    name = f"{bank}, {gate.trainer.model.dtype}, rank {gate.config.rank}, strength {gate.config.strength}"
    report(f"Gains on unseen items, nats a token: {name}", list(rows(tried)), out)


@dataclass(frozen=True, slots=True)
class Gate:
    """A worker's trainer, with a bank's lookups."""

    trainer: AdapterTrainer
    serving: ServingBank
    embedder: Embedder
    config: AdaptConfig

    @classmethod
    def open(cls, folder: Path, settings: Settings, strength: float | None) -> Gate:
        embedder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
        serving = ServingBank.open(folder, embedder.id)
        model = ensure_base_model(settings.model, settings.cache_dir)
        config = default_config(serving.manifest.room)
        config = config if strength is None else replace(config, strength=strength)
        trainer = AdapterTrainer.open(folder, serving.manifest, model, resolve_dtype(settings.dtype))
        return cls(trainer, serving, embedder, config)

    def outcome(self, person: History, count: int, unseen: int) -> Outcome:
        task, trainer = self.trainer.task, self.trainer
        items, later = person.items[-count - unseen : -unseen], person.pairs(task)[-unseen:]
        embedding, pairs = mean_embedding(items, task, self.embedder), pairs_of(items, task)

        def recipe_of(signature: Signature | None, strength: float) -> FusionRecipe:
            return self.serving.personalise(embedding, signature, strength).recipe

        signature = trainer.signature(pairs) if trainer.manifest.has_signatures else None
        samples = [Sample(chat_messages(turn), output) for turn, output in pairs]
        judgement = trainer.train(JobUser(recipe_of, signature, items), samples, self.config).finish()
        gain = 0.0
        if judgement.weights:
            served = as_served(trainer.manifest, trainer.tokenizer, [output for _, output in pairs])
            examples = [served(encode_pair(trainer.tokenizer, *pair, MAX_TOKENS)) for pair in later]
            merged, beneath = (
                fuse(trainer.matrix, recipe_of(signature, strength), torch.float32)
                for strength in (1.0, self.config.strength)
            )
            adapter = stack(beneath, UserAdapter("", judgement.weights), torch.float32)
            gain = self._loss(merged, examples) - self._loss(adapter, examples)
        return Outcome(count, judgement.weights is not None, gain)

    def _loss(self, lora: LoraWeights, examples: Sequence[Example]) -> float:
        with attached(self.trainer.model, lora, shared=self.trainer.shared) as here:
            return mean_loss(here.model, examples)


def rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, object]]:
    for count in sorted({outcome.count for outcome in outcomes}):
        some = [outcome for outcome in outcomes if outcome.count == count]
        promoted = [outcome.gain for outcome in some if outcome.is_promoted]
        gain = f", gain {over_users(promoted)}" if promoted else ""
        yield f"{count} samples", f"{len(promoted)} of {len(some)} promoted{gain}"
    gains = [outcome.gain for outcome in outcomes if outcome.is_promoted]
    worse = sum(gain < 0 for gain in gains)
    yield "promoted adapters that are worse than what is served", f"{worse} of {len(gains)} (at most one in twenty)"
    if gains:
        yield "gain of a promoted adapter; the worst", f"{over_users(gains)}; {min(gains):+.3f}"
        yield "gain of all, without an adapter if it was rejected", str(over_users([o.gain for o in outcomes]))


def outsiders(path: Path) -> Path:
    """Write people who answer the questions of another manner's world, which no anchor of their manner has seen."""
    made_up = []
    for (manner, other), seed in product(permutations(MANNERS, 2), range(len(OUTSIDERS))):
        asked = [pair for topic in worlds()[other.world].values() for pair in topic]
        random.Random(seed).shuffle(asked)
        profile = [{"input": question, "output": manner.write(plain, OUTSIDERS[seed])} for question, plain in asked]
        made_up.append({"user_id": f"{manner.world}-{other.world}-{seed}", "profile": profile, "query": []})
    return write_people(path, made_up)


if __name__ == "__main__":
    script(main)
