"""Do answers repeat habits, or recite a person's old texts? And whose are they? With phrase tables and without.

    python -m evaluation.studies.recitation --bank BANK --users DATA/mail/users.json

For each person outside of the bank, each of their queries is answered by `merged`, at several temperatures and
strengths of the anchors, with and without the person's phrase table. An answer recites if twelve words in a row stand
in one of the person's items alone; it loops if it has six words in a row three times. Two judges
(`evaluation.authorship`) say whether it sounds like the person. The person's own later texts are measured in the
same way; chance is one in the number of people. The loss is that of those texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.progress import track

from bank.items.histories import read_histories
from bank.items.profile import own_texts
from bank.lookup.embedder import Embedder
from bank.models.folders import ensure_base_model, ensure_embedder
from bank.models.load import load_base, resolve_dtype
from bench import script
from bench.page.report import Figures, console, tabulate
from evaluation.authorship import GOLD, authorship
from evaluation.methods import METHODS, Evaluator
from evaluation.run import Record
from evaluation.scoring import OpenBank, Scorer
from server.settings import load_settings

RECITED, LOOPED, LOOPS = 12, 6, 3  # words in a row; times
COLUMNS = ("answers", "loss", "texts", "recite, %", "loop, %", "words", "distinct pairs, %")
NAMED = "named by {}, %"
OWN = "their own later texts"
METHODS_READ = {"without": METHODS["merged"], "with": METHODS["merged+words"]}


@dataclass(frozen=True, slots=True)
class Text:
    recites: bool
    loops: bool
    words: int
    distinct: float  # share of its pairs of words that differ

    @classmethod
    def of(cls, text: str, items: Sequence[str]) -> Text:
        """Measure a text of somebody who wrote these items."""
        words = text.split()
        stands = Counter(run for item in items for run in set(_runs(item.split(), RECITED)))
        recites = any(stands[run] == 1 for run in _runs(words, RECITED))
        loops = any(count >= LOOPS for count in Counter(_runs(words, LOOPED)).values())
        pairs = list(_runs(words, 2))
        return cls(recites, loops, len(words), len(set(pairs)) / len(pairs) if pairs else 1.0)


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[at : at + length]) for at in range(len(words) - length + 1))


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank with trust in phrases.", exists=True)],
    users: Annotated[Path, typer.Option(help="People with queries, in LaMP's per-user layout.", exists=True)],
    people: Annotated[int | None, typer.Option(help="At most so many people.")] = None,
    texts: Annotated[int, typer.Option(help="Answers to each query.", min=1)] = 1,
    temperatures: Annotated[str, typer.Option(help="Temperatures.")] = "0,0.7,1",
    strengths: Annotated[str, typer.Option(help="Factors on the anchors' weights.")] = "1",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure."""
    settings = load_settings()
    embedder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    opened = OpenBank.open(bank, embedder.id)
    folder = ensure_base_model(settings.model, settings.cache_dir, opened.manifest.base_model)
    scorer = Scorer(*load_base(folder, resolve_dtype(settings.dtype)))
    evaluator, task = Evaluator(bank=opened, scorer=scorer, embedder=embedder), opened.serving.task
    found, losses, records = dict[str, list[Text]](), dict[str, list[float]](), list[Record]()
    histories = read_histories(users, task, queries=True)[:people]
    for user in track(histories, "writing", console=console()):
        known, items = evaluator.evidence(user), own_texts(user.items, task)
        found.setdefault(OWN, []).extend(Text.of(query.gold, items) for query in user.queries)
        for strength, (what, method) in product(_numbers(strengths), METHODS_READ.items()):
            adapter, phrases = evaluator.fused(known, strength), evaluator.phrases(method, known)
            examples, readings = evaluator.read(method, known, adapter)
            for temperature in _numbers(temperatures):
                written = scorer.write(adapter, examples, texts, phrases, temperature)
                name = f"strength {strength:g}, {what} phrases, temperature {temperature:g}"
                said = [text for each in written for text in each]
                found.setdefault(name, []).extend(Text.of(text, items) for text in said)
                losses.setdefault(name, []).append(fmean(reading.loss for reading in readings))
                records.append(Record(user.user_id, "", name, 0, 0.0, None, "", written=said))
    voices = authorship(histories, records, task)
    named = {(row.judge, OWN if row.method == GOLD else row.method): row.named for row in voices}
    judges = list(dict.fromkeys(judge for judge, _ in named))
    lines = [
        [
            name,
            fmean(losses[name]) if name in losses else "",
            len(rows),
            100 * fmean(row.recites for row in rows),
            100 * fmean(row.loops for row in rows),
            fmean(row.words for row in rows),
            100 * fmean(row.distinct for row in rows),
            *(named[judge, name].cell(".0%") for judge in judges),
        ]
        for name, rows in found.items()
    ]
    columns = (*COLUMNS, *map(NAMED.format, judges))
    tabulate([Figures(f"{users}, {bank}", columns, lines)], out, bench="parrot")


if __name__ == "__main__":
    script(main)
