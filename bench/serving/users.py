"""Serve every user of a file through the API from scratch, answer all their queries, and check the answers.

The benchmark erases these users first. With a bank that has signatures, it waits for them, since recipes change until
then. Each query is answered three times, greedily and without past items in the prompt: at level merged, by the base
model, and at level merged again, one at a time. The checks: all answers are merged, most differ from the base model's,
and repeats are equal. With signatures there must be about as many recipes as users; by topic, similar people share a
recipe, but not all do. A repeat can differ if two tokens are nearly equally likely, because batches of different sizes
round differently: often in bfloat16, rarely in float32. With `--engine` the benchmark examines each difference and
reports the gap between the two most likely tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import Progress

from bench import script
from bench.page.report import marked, report
from bench.rig.client import until_signed
from mta_client import Answer, Client

NEAR_TIE = 0.25
"""Largest gap in nats between two tokens that rounding can swap: bfloat16 has 8 bits of precision, so logits of 16 to
32 have steps of 0.125, and each token can be off by one step."""


@dataclass(slots=True)
class Query:
    """One query of one user, and its answers.

    Attributes:
        user_id, id, input, gold: fields of the file.
        level, recipe, source: personalization of the merged answer.
        merged, none, again: the three answers.
        recipe_again: recipe of the third answer.
        gap_nats, instead_of: the two most likely tokens where `again` and `merged` diverge: their distance and texts.
    """

    user_id: str
    id: str
    input: str
    gold: str
    level: str = ""
    recipe: str | None = None
    source: str | None = None
    merged: str = ""
    none: str = ""
    again: str = ""
    recipe_again: str | None = None
    gap_nats: float | None = None
    instead_of: str = ""

    @property
    def stays(self) -> bool:
        """Whether both merged answers have the same recipe; otherwise they cannot be compared."""
        return self.recipe_again == self.recipe

    @property
    def differs(self) -> bool:
        """Whether the merged answers differ although the recipe is the same."""
        return self.stays and self.again != self.merged

    @property
    def difference(self) -> str:
        """The verdict on a repeat that differs."""
        if self.gap_nats is None:
            return "not examined: needs --engine"
        verdict = "a near-tie" if self.gap_nats <= NEAR_TIE else "NOT a near-tie, unexplained"
        return f"{self.instead_of}, {self.gap_nats:.4f} nats: {verdict}"


def main(
    *,
    users: Annotated[Path, typer.Option(help="Users in the LaMP per-user layout, with their queries.")],
    url: Annotated[str, typer.Option(help="URL of the gateway.")] = "http://127.0.0.1:8000",
    engine: Annotated[str | None, typer.Option(help="URL of the engine, to examine differences.")] = None,
    key: Annotated[str, typer.Option(help="The engine's key.", envvar="MTA_ENGINE_KEY")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 32,
    out: Annotated[Path, typer.Option(help="Write the answers as JSON.")] = Path("answers.json"),
) -> None:
    """Set up all users, answer all queries, and check the counts; exit status 1 if one is wrong."""
    people = json.loads(users.read_text(encoding="utf-8"))
    queries = [Query(p["user_id"], q["id"], q["input"], q["gold"]) for p in people for q in p["query"]]
    with Client(url, timeout_s=600) as client, Progress() as progress:

        def all_of(title: str, work: Callable[[Any], object], of: Sequence[Any], at_a_time: int = 8) -> None:
            task = progress.add_task(title, total=len(of))
            with ThreadPoolExecutor(at_a_time) as pool:
                for _ in pool.map(work, of):
                    progress.advance(task)

        all_of("profiles", lambda person: _set_up(client, person), people)
        until_signed(client, [person["user_id"] for person in people])
        all_of("merged", lambda query: _merged(client, query, max_tokens), queries)
        all_of("base model", lambda query: _none(client, query, max_tokens), queries)
        all_of("merged again", lambda query: _again(client, query, max_tokens), queries, 1)
        different = [query for query in queries if query.differs]
        if engine:
            with httpx.Client(base_url=engine, headers={"Authorization": f"Bearer {key}"}, timeout=600) as inner:
                all_of("differences", lambda query: _look(inner, query), different, 1)
    rows = [(name, marked(value, good)) for name, value, good in judged(queries)]
    rows += [(f"differs: {query.id}", query.difference) for query in different]
    report(f"{len(people)} users, {len(queries)} queries", rows, out, answers=[asdict(query) for query in queries])


def _set_up(client: Client, person: Mapping[str, Any]) -> None:
    client.forget(person["user_id"], missing_ok=True)  # an earlier signature would be used until it is replaced
    client.put_profile(person["user_id"], person["profile"])


def _generate(client: Client, query: Query, max_tokens: int, personalize: str) -> Answer:
    """Request an answer without history, so that `_look` can send the engine the same prompt."""
    options = {"personalize": personalize, "history": 0, "max_tokens": max_tokens, "temperature": 0}
    return client.generate(query.user_id, query.input, **options)


def _merged(client: Client, query: Query, max_tokens: int) -> None:
    answer = _generate(client, query, max_tokens, "merged")
    who = answer.personalization
    query.merged, query.level, query.recipe, query.source = answer.text, who.level, who.recipe, who.source


def _none(client: Client, query: Query, max_tokens: int) -> None:
    query.none = _generate(client, query, max_tokens, "none").text


def _again(client: Client, query: Query, max_tokens: int) -> None:
    answer = _generate(client, query, max_tokens, "merged")
    query.again, query.recipe_again = answer.text, answer.personalization.recipe


def _look(engine: httpx.Client, query: Query) -> None:
    """Score the longer of the two answers in the engine, and note the most likely tokens where the answers diverge."""
    read = max(query.merged, query.again, key=len)
    body = {
        "model": query.recipe,
        "messages": [{"role": "user", "content": query.input}, {"role": "assistant", "content": read}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "max_tokens": 1,
        "prompt_logprobs": 2,
        "return_token_ids": True,
    }
    answer = engine.post("/v1/chat/completions", json=body).raise_for_status().json()
    shared = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(query.merged, query.again, strict=False)))
    place = len(read)
    for token, entry in zip(reversed(answer["prompt_token_ids"]), reversed(answer["prompt_logprobs"]), strict=True):
        place -= len(entry[str(token)]["decoded_token"])
        if place <= shared:
            first, second = sorted(entry.values(), key=lambda choice: choice["rank"])[:2]
            query.gap_nats = first["logprob"] - second["logprob"]
            query.instead_of = f"{first['decoded_token']!r} or {second['decoded_token']!r}"
            return


def judged(queries: Sequence[Query]) -> list[tuple[str, str, bool]]:
    """Return the counts with their names and whether each is right."""
    total, users = len(queries), len({query.user_id for query in queries})
    merged = sum(query.level == "merged" for query in queries)
    recipes = len({query.recipe for query in queries})
    signed = [query for query in queries if query.source == "signature"]
    signers, own = len({query.user_id for query in signed}), len({query.recipe for query in signed})
    differ = sum(query.merged != query.none for query in queries)
    stayed = sum(query.stays for query in queries)
    equal = stayed - sum(query.differs for query in queries)
    unexplained = sum(q.differs and (q.gap_nats is None or q.gap_nats > NEAR_TIE) for q in queries)
    return [
        ("answers at level merged", f"{merged} of {total}", merged == total),
        ("distinct recipes", f"{recipes} for {users} users", recipes >= min(2, users)),
        ("of them by signature", f"{own} for {signers} users", 2 * own >= signers),
        ("answers that differ from the base model's", f"{differ} of {total}", differ > 0.8 * total),
        ("answers with the same recipe when asked again", f"{stayed} of {total}", stayed == total),
        ("of them equal, alone", f"{equal} of {stayed}", 60 * equal >= 59 * stayed),
        ("unexplained differences", str(unexplained), not unexplained),
    ]


if __name__ == "__main__":
    script(main)
