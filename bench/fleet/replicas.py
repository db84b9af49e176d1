"""Check that two engines behind the router answer like one, and that each recipe is on only one of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import script
from bench.fleet.exercise.machine import ENGINES, engine_of, wait_for_router
from bench.page.report import marked, report
from bench.rig.engine import KEY
from bench.rig.subject import BankOption, ModelOption, configured_subject
from bench.rig.up import Up, up
from mta_client import Client

CONCURRENCY = 4


@dataclass(frozen=True, slots=True)
class Found:
    """Results of the comparison."""

    answers: int  # number of answers
    differing: list[str]  # queries that a single engine answers differently
    resident: Mapping[str, set[str]]  # recipes that each engine held before the single engine served all of them
    recipes: set[str]  # recipes of all people

    @property
    def twice(self) -> set[str]:
        """Recipes on both engines."""
        return set.intersection(*self.resident.values()) & self.recipes

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The rows of the report."""
        held = [(f"recipes on {name}", str(len(held & self.recipes))) for name, held in self.resident.items()]
        equal = self.answers - len(self.differing)
        everywhere = set.union(*self.resident.values()) >= self.recipes
        return [
            ("answers equal to one engine's", marked(f"{equal} of {self.answers}", not self.differing)),
            ("recipes", marked(len(self.recipes), everywhere)),
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
    asked: list[tuple[str, str, str]] = []
    greedy = {"max_tokens": max_tokens, "temperature": 0}

    def serve(person: Mapping[str, Any]) -> None:
        client.put_profile(person["user_id"], person["profile"])
        for query in person["query"]:
            answer = client.generate(person["user_id"], query["input"], personalize="merged", history=0, **greedy)
            assert answer.personalization.recipe
            asked.append((answer.personalization.recipe, query["input"], answer.text))

    with Client(started.url, timeout_s=600) as client, ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(serve, people))
    resident = {}
    for name in ENGINES:
        with engine_of(started, name) as engine:
            resident[name] = set(engine.resident()["resident"])
    with engine_of(started, ENGINES[0]) as engine, ThreadPoolExecutor(CONCURRENCY) as pool:

        def alone(recipe: str, text: str) -> str:
            answer = engine.chat(recipe, text, **greedy).raise_for_status()
            said: str = answer.json()["choices"][0]["message"]["content"]
            return said

        again = list(pool.map(lambda one: alone(one[0], one[1]), asked))
    differing = [text for (_, text, before), after in zip(asked, again, strict=True) if after != before]
    return Found(len(asked), differing, resident, {recipe for recipe, _, _ in asked})


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
