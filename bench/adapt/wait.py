"""Measure the wait for few-shot adaptation: from `POST adapt` to the first answer with the new adapter.

Starts `mta up` with the bank and sends requests like an app, for one person after the other. The people are made up;
each has a manner of writing that is learned quickly, so that adapters are promoted.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from bench import script
from bench.page.report import Figures, Spread, tabulate
from bench.rig.people import WORDS
from bench.rig.subject import BankOption, ModelOption, TinyOption, configured_subject, tiny
from bench.rig.up import up
from mta_client import Client

WORDS_EACH = 16
"""Words of a sample's answer, about one token each."""
COLUMNS = ("samples", "words of each", "seconds to the first stacked answer", "jobs", "first answers")


def main(
    *,
    bank: BankOption = None,
    model: ModelOption = None,
    tiny_model: TinyOption = False,
    people: Annotated[int, typer.Option(help="Number of people, after one for warm-up.", min=1)] = 5,
    samples: Annotated[int, typer.Option(help="Samples per person.", min=2)] = 10,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = Path("out/bench/adapt.json"),
) -> None:
    """Measure the time from posting samples to the first stacked answer."""
    seconds, ended, levels = [], Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        subject = tiny(Path(scratch)) if tiny_model else configured_subject(bank, model)
        options = ("--bank", str(subject.bank), "--model", str(subject.model))
        with up(Path(scratch) / "data", *options) as server, Client(server.url, timeout_s=600) as client:
            for person in track(range(people + 1), "adapt and ask"):
                taken_s, state, level = _adapt(client, person, samples)
                if person:
                    seconds.append(taken_s)
                    ended[state] += 1
                    levels[level] += 1
    title = f"{subject.title}: few-shot adapting, {people} people one after the other"
    line = [samples, WORDS_EACH, Spread.of(seconds), _counts(ended), _counts(levels)]
    tabulate([Figures(title, COLUMNS, [line])], out, bench="adapt", readings=seconds)


def _adapt(client: Client, person: int, samples: int) -> tuple[float, str, str]:
    """Adapt one person from scratch: return the seconds until the first answer, the job's state, and the level."""
    chance, user = random.Random(person), f"bench-adapt-{person}"
    mark = chance.choice(WORDS)

    def text() -> str:
        return " ".join([mark, *(f"{chance.choice(WORDS)} {mark}" for _ in range(WORDS_EACH // 2))])

    client.put_profile(user, [text() for _ in range(4)])
    made = [{"input": f"Write about {chance.choice(WORDS)}.", "output": text()} for _ in range(samples)]
    start_s = time.perf_counter()
    job = client.wait(client.adapt(user, made).id)
    answer = client.generate(user, "Write about the weather.", max_tokens=1, temperature=0)
    return time.perf_counter() - start_s, job.state, answer.personalization.level


def _counts(of: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in of.items())


if __name__ == "__main__":
    script(main)
