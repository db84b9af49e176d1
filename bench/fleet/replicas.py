"""Check that two engines behind the router answer like one, and that each recipe is on only one of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import script
from bench.fleet.exercise.machine import ENGINES, engine_of, wait_for_router
from bench.page.report import marked, report
from bench.rig.client import until_signed
from bench.rig.engine import KEY
from bench.rig.subject import BankOption, ModelOption, configured_subject
from bench.rig.up import Up, up
from mta_client import Client

CONCURRENCY = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """One query and its answers, all greedy."""

    recipe: str
    source: str | None  # of the recipe
    text: str
    through_router: str  # the answer at level merged
    base: str  # the base model's answer
    alone: str = ""  # the first engine's answer with the same recipe


@dataclass(frozen=True, slots=True)
class Found:
    """Results of the comparison."""

    asked: list[Asked]
    resident: Mapping[str, set[str]]  # recipes that each engine held before the single engine served all of them

    @property
    def differing(self) -> list[str]:
        """Queries that a single engine answers differently."""
        return [one.text for one in self.asked if one.alone != one.through_router]

    @property
    def recipes(self) -> set[str]:
        """Recipes of all people."""
        return {one.recipe for one in self.asked}

    @property
    def twice(self) -> set[str]:
        """Recipes on both engines."""
        return set.intersection(*self.resident.values()) & self.recipes

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The rows of the report."""
        total, signed = len(self.asked), {one.recipe for one in self.asked if one.source == "signature"}
        equal = total - len(self.differing)
        personal = sum(one.through_router != one.base for one in self.asked)
        held = [(f"recipes on {name}", str(len(held & self.recipes))) for name, held in self.resident.items()]
        everywhere = set.union(*self.resident.values()) >= self.recipes
        return [
            ("answers equal to one engine's", marked(f"{equal} of {total}", not self.differing)),
            ("answers unlike the base model's", f"{personal} of {total}"),
            ("recipes", marked(len(self.recipes), everywhere)),
            ("recipes by signature", str(len(signed))),
            *held,
            ("recipes on both engines", marked(len(self.twice), not self.twice)),
        ]


def compared(started: Up, people: Sequence[Mapping[str, Any]], max_tokens: int) -> Found:
    """Answer every query through the router, then all of them on the first engine alone.

    Args:
        started: `mta up` with two float32 engines that have the key `KEY`; in bfloat16, rounding depends on the batch.
        people: people in LaMP's per-user layout, with their queries.
        max_tokens: maximum tokens per answer.
    """
    greedy = {"max_tokens": max_tokens, "temperature": 0}

    def ask(user_id: str, text: str) -> Asked:
        merged, base = (
            client.generate(user_id, text, personalize=level, history=0, **greedy) for level in ("merged", "none")
        )
        who = merged.personalization
        assert who.recipe
        return Asked(who.recipe, who.source, text, merged.text, base.text)

    def ask_alone(one: Asked) -> Asked:
        answer = engine.chat(one.recipe, one.text, **greedy).raise_for_status()
        return replace(one, alone=answer.json()["choices"][0]["message"]["content"])

    users = [person["user_id"] for person in people]
    queries = [(person["user_id"], query["input"]) for person in people for query in person["query"]]
    with Client(started.url, timeout_s=600) as client, ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(lambda person: client.put_profile(person["user_id"], person["profile"]), people))
        until_signed(client, users)
        asked = list(pool.map(lambda query: ask(*query), queries))
    resident = {}
    for name in ENGINES:
        with engine_of(started, name) as engine:
            resident[name] = set(engine.resident()["resident"])
    with engine_of(started, ENGINES[0]) as engine, ThreadPoolExecutor(CONCURRENCY) as pool:
        return Found(list(pool.map(ask_alone, asked)), resident)


def main(
    users: Annotated[Path, typer.Option(help="Users in the LaMP per-user layout, with their queries.")],
    bank: BankOption = None,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 32,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Serve every user of a file with two engines, and compare with one; exit status 1 if they differ."""
    people = json.loads(users.read_text(encoding="utf-8"))
    subject = configured_subject(bank, model)
    options = ("--bank", str(subject.bank), "--model", str(subject.model), "--replicas", "2", "--dtype", "float32")
    with (
        tempfile.TemporaryDirectory() as data,
        up(Path(data), *options, environment={"MTA_ENGINE_KEY": KEY}) as started,
    ):
        wait_for_router(started)
        found = compared(started, people, max_tokens)
    report(f"{len(people)} users, two engines", found.rows, out)


if __name__ == "__main__":
    script(main)
