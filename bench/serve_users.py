"""Every user of a file, served: set up through the API, all their queries generated, and what that shows.

Each query is generated three times, greedy: at level merged, by the base model, and at level merged again, one at a
time. Then: is every answer merged, are there about as many recipes as users, do answers differ from the base model's,
and do they repeat. A repeat may differ where two tokens are nearly as likely, because a batch of another size rounds
otherwise; with `--engine` each difference is looked at: how far apart were the two likeliest tokens there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import Progress

from bench.report import report

NEAR_TIE = 0.1
"""Nats between the two likeliest tokens below which bfloat16 rounding can exchange them."""


@dataclass(slots=True)
class Query:
    """One query of one user, and its answers.

    Attributes:
        user_id, id, input, gold: from the file.
        level, recipe: of the merged answer.
        merged, none, again: the three answers.
        difference: why `again` differs from `merged`, if it does.
    """

    user_id: str
    id: str
    input: str
    gold: str
    level: str = ""
    recipe: str | None = None
    merged: str = ""
    none: str = ""
    again: str = ""
    difference: str | None = None


def main(
    *,
    users: Annotated[Path, typer.Option(help="Users in the LaMP per-user layout, with their queries.")],
    url: Annotated[str, typer.Option(help="URL of the gateway.")] = "http://127.0.0.1:8000",
    engine: Annotated[str | None, typer.Option(help="URL of the engine, to look into differences.")] = None,
    key: Annotated[str, typer.Option(help="The engine's key.", envvar="MTA_ENGINE_KEY")] = "",
    concurrency: Annotated[int, typer.Option(help="Requests at a time in the first two passes.", min=1)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 32,
    out: Annotated[Path, typer.Option(help="Where the answers go, as JSON.")] = Path("answers.json"),
) -> None:
    """Set up all users, generate all queries, and count; status 1 when a count is not what it must be."""
    people = json.loads(users.read_text(encoding="utf-8"))
    queries = [Query(p["user_id"], q["id"], q["input"], q["gold"]) for p in people for q in p["query"]]
    with httpx.Client(base_url=url, timeout=600) as client, Progress() as progress:

        def all_of(title: str, work: Callable[[Any], None], of: Sequence[Any], at_a_time: int = concurrency) -> None:
            task = progress.add_task(title, total=len(of))
            with ThreadPoolExecutor(at_a_time) as pool:
                for _ in pool.map(work, of):
                    progress.advance(task)

        all_of("profiles", lambda person: _set_up(client, person), people)
        all_of("merged", lambda query: _merged(client, query, max_tokens), queries)
        all_of("base model", lambda query: _none(client, query, max_tokens), queries)
        all_of("merged again", lambda query: _again(client, query, max_tokens), queries, 1)
        different = [query for query in queries if query.again != query.merged]
        if engine:
            with httpx.Client(base_url=engine, headers={"Authorization": f"Bearer {key}"}, timeout=600) as inner:
                all_of("differences", lambda query: _look(inner, query, max_tokens), different, 1)
    checks = _checks(queries, len(people))
    rows = [(name, f"{value}{'' if good else '  ← not as it must be'}") for name, value, good in checks]
    rows += [(f"differs: {query.id}", query.difference or "not looked at: give --engine") for query in different]
    report(f"{len(people)} users, {len(queries)} queries", rows, out, answers=[asdict(query) for query in queries])
    typer.echo(f"answers: {out}")
    if not all(good for _, _, good in checks):
        raise typer.Exit(1)


def _set_up(client: httpx.Client, person: dict[str, Any]) -> None:
    client.put(f"/users/{person['user_id']}/profile", json={"items": person["profile"]}).raise_for_status()


def _generate(client: httpx.Client, query: Query, max_tokens: int, personalize: str) -> dict[str, Any]:
    body = {"user_id": query.user_id, "prompt": query.input, "personalize": personalize}
    response = client.post("/generate", json=body | {"max_tokens": max_tokens, "temperature": 0})
    answer: dict[str, Any] = response.raise_for_status().json()
    return answer


def _merged(client: httpx.Client, query: Query, max_tokens: int) -> None:
    answer = _generate(client, query, max_tokens, "merged")
    query.merged = answer["text"]
    query.level, query.recipe = answer["personalization"]["level"], answer["personalization"]["recipe"]


def _none(client: httpx.Client, query: Query, max_tokens: int) -> None:
    query.none = _generate(client, query, max_tokens, "none")["text"]


def _again(client: httpx.Client, query: Query, max_tokens: int) -> None:
    query.again = _generate(client, query, max_tokens, "merged")["text"]


def _look(engine: httpx.Client, query: Query, max_tokens: int) -> None:
    """Ask the engine how likely the tokens were where the two answers part."""
    body = {
        "model": query.recipe,
        "messages": [{"role": "user", "content": query.input}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = engine.post("/v1/chat/completions", json=body).raise_for_status().json()
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(query.merged, query.again, strict=False))
    shared = len("".join(character for character, _ in same).encode())
    place = 0
    for token in answer["choices"][0]["logprobs"]["content"]:
        place += len(bytes(token["bytes"]))
        if place > shared:
            first, second = token["top_logprobs"]
            gap = first["logprob"] - second["logprob"]
            verdict = "a near-tie, decided by rounding" if gap < NEAR_TIE else "NO near-tie: unexplained"
            query.difference = f"{first['token']!r} or {second['token']!r}: {gap:.4f} nats apart, {verdict}"
            return
    query.difference = "the engine, asked alone, ends before the two answers part"


def _checks(queries: Sequence[Query], users: int) -> list[tuple[str, str, bool]]:
    """What is counted, and whether it is as it must be."""
    merged = sum(query.level == "merged" for query in queries)
    recipes = len({query.recipe for query in queries})
    differ = sum(query.merged != query.none for query in queries)
    equal = sum(query.merged == query.again for query in queries)
    total = len(queries)
    return [
        ("answers at level merged", f"{merged} of {total}", merged == total),
        ("distinct recipes", f"{recipes} for {users} users", 2 * recipes >= users),
        ("answers that differ from the base model's", f"{differ} of {total}", differ > 0.8 * total),
        ("answers that are equal when asked again, alone", f"{equal} of {total}", 60 * equal >= 59 * total),
    ]


if __name__ == "__main__":
    typer.run(main)
