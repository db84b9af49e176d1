"""How large are phrase tables of few and many items, how long does one take, and what is it worth?

    python -m evaluation.studies.phrase_tables --bank BANK --users DATA/news_headline/anchors.json

Each person's last items are read under the bank's common row, and with the table of so many items before them. People
with fewer items are left out of a line.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from adapters.errors import MtaError
from bank.building.signer import Signer
from bank.items.histories import read_histories
from bank.items.prompt import answer_ids, encode_pair
from bank.lookup.embedder import Embedder
from bank.lookup.phrases import TrustedPhrases, phrase_table
from bank.models.folders import ensure_base_model, ensure_embedder
from bank.models.load import load_base, resolve_dtype
from bench import script
from bench.page.report import Figures, console, tabulate
from evaluation.intervals import over_users
from evaluation.scoring import OpenBank
from server.settings import load_settings

MAX_TOKENS = 512  # of an item that is read
COLUMNS = ("items", "people", "tokens", "bytes", "ms", "less loss, nats a token")


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank with trust in phrases.", exists=True)],
    users: Annotated[Path, typer.Option(help="People, in LaMP's per-user layout.", exists=True)],
    counts: Annotated[str, typer.Option("--items", help="Numbers of items.")] = "10,100,512",
    last: Annotated[int, typer.Option(help="Items of each person that are read.", min=1)] = 6,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure; bytes and milliseconds are medians over people."""
    settings, numbers = load_settings(), [int(count) for count in counts.split(",")]
    opened = OpenBank.open(bank, Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir)).id)
    task, rule = opened.serving.task, opened.manifest.phrases
    if rule is None:
        raise MtaError(f"the bank at {bank} has no trust in phrases: use another")
    folder = ensure_base_model(settings.model, settings.cache_dir, opened.manifest.base_model)
    model, tokenizer = load_base(folder, resolve_dtype(settings.dtype))
    signer = Signer(model, opened.matrix, opened.manifest.acts)
    people = [person.pairs(task) for person in read_histories(users, task, queries=False)]
    rows: dict[int, list[tuple[int, int, float, float]]] = {count: [] for count in numbers}
    for pairs in track([each for each in people if len(each) >= last + min(numbers)], "reading", console=console()):
        later = [encode_pair(tokenizer, *pair, MAX_TOKENS) for pair in pairs[-last:]]
        losses = signer.token_losses(np.zeros(opened.matrix.anchors, np.float32), later)
        for count in (count for count in numbers if len(pairs) >= last + count):
            began_s = time.perf_counter()
            texts = answer_ids(tokenizer, [output for _, output in pairs[-last - count : -last]])
            phrases = TrustedPhrases(phrase_table(texts), rule.trust)
            ms = 1e3 * (time.perf_counter() - began_s)
            gains = []
            for example, known in zip(later, losses, strict=True):
                kept, added = np.array(phrases.mixed(example).mixed).T
                gains.append(float(np.log(kept + added * np.exp(known)).mean()))
            rows[count].append((sum(map(len, texts)), phrases.table.nbytes, ms, float(np.mean(gains))))
    lines = []
    for count, found in rows.items():
        if found:
            tokens, sizes, times, worth = zip(*found, strict=True)
            cells = (median(tokens), median(sizes), median(times), over_users(list(worth)).cell("+.4f"))
            lines.append([count, len(found), *cells])
    tabulate([Figures(f"{users}, {bank}", COLUMNS, lines)], out, bench="tables")


if __name__ == "__main__":
    script(main)
