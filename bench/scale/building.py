"""Measure the memory that a build takes for its rows, by number of anchors: the peak of what is no mapped file.

A tiny model's rows are trained, used and written as in a build, in a process for each bank. The rank is high, so that
rows outweigh all else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bank.building.assemble import Anchors, BankRows, Basis, Rules, write_bank
from bank.building.directions import make_directions
from bank.building.options import BuildOptions
from bank.building.progress import RowProgress
from bank.building.ranks import Ranks
from bank.building.resume import Workbench
from bank.building.rows import RowTrainer
from bank.building.signer import Signer
from bank.items.histories import History
from bank.items.profile import Item
from bank.items.tasks import get_task
from bank.lookup.signature import Curvature
from bank.manifest import BaseModelId, EmbedderId, WeightRule
from bank.models.load import load_base
from bench import script
from bench.page.report import Figures, tabulate
from bench.rig.tiny import tiny_model

COLUMNS = ("anchors", "rows in bf16, MiB", "peak more than before the rows, MiB")


def main(
    anchors: Annotated[list[int], typer.Option(help="Number of anchors; may be repeated.")] = [64, 256, 1024],  # noqa: B006
    rank: Annotated[int, typer.Option(help="Rank of the rows.")] = 256,
    only: Annotated[Path | None, typer.Option(help="Build one bank in this folder, and print its line.")] = None,
) -> None:
    """Build banks of a tiny model."""
    if only:
        print(*_line(anchors[0], rank, only))
        return
    lines = list[list[object]]()
    for count in anchors:
        with tempfile.TemporaryDirectory() as folder:
            options = ("--anchors", str(count), "--rank", str(rank), "--only", folder)
            told = subprocess.check_output([sys.executable, "-m", "bench.scale.building", *options], text=True)
            lines.append([float(word) for word in told.split()])
    tabulate([Figures("Memory of a build", COLUMNS, lines)], None, bench="building")


def _line(anchors: int, rank: int, folder: Path) -> list[object]:
    items = tuple(Item(str(n), {"input": f"Say {n}", "output": f"{n}!"}) for n in range(4))
    people = [History(f"p{n}", items) for n in range(anchors)]
    options = BuildOptions("chat", rank=rank, steps=1, common_steps=1, batch_size=1, common_batch_size=1)
    model, tokenizer = load_base(tiny_model(folder / "model"), "float32")
    trainer = RowTrainer(model, tokenizer, get_task("chat"), options, RowProgress())
    (work := folder / "work").mkdir()
    (warm := folder / "warm").mkdir()
    trainer.rows(Workbench(warm, Ranks()), people[:1], people[:1])  # memory for a step
    before, peak, ended = _anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, _anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        written = _build(trainer, Workbench(work, Ranks()), people, folder / "bank")
    finally:
        ended.set()
        watcher.join()
    return [anchors, written / 2**20, peak - before]


def _build(trainer: RowTrainer, work: Workbench, people: list[History], out: Path) -> int:
    """Train, use and write the rows; return the bytes of all."""
    matrix = trainer.rows(work, people[:1], people)
    signer = Signer(trainer.model, matrix, trainer.options.acts)
    examples = trainer.job("one", people[:1], 1, 4).examples
    signer.drawn_products(examples, 0)
    signer.losses(np.ones((2, len(people)), np.float32), examples)
    directions = make_directions(Curvature.of(np.diag(np.arange(1.0, 1 + len(people)))), 8, 1.0)
    write_bank(
        out,
        Basis("chat", BaseModelId(name="tiny", hash="0" * 64), EmbedderId(id="e" * 16, dim=4), user_rank=0),
        BankRows(matrix.layout, list(matrix.rows), matrix.shared_a, directions=directions),
        Anchors(np.eye(len(people), 4, dtype=np.float32), [4] * len(people)),
        Rules(WeightRule()),
        training={},
    )
    return matrix.rows.nbytes


def _anonymous_mib() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    script(main)
