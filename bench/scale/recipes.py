"""Serve very many distinct recipes on one engine with a tiny model, and check that memory and rate stay constant."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from rich.progress import Progress

from bench.page.report import Figures
from bench.rig.engine import Engine
from bench.rig.processes import descendants, memory_mib
from bench.rig.servers import vllm_server
from bench.rig.subject import Subject, tiny
from bench.serving.load import Ask, Prompts, loading

ANCHORS, CLIENTS, SLOTS, TOKENS, TENTHS = 64, 16, 8, 2, 10
COLUMNS = ("recipes served", "resident memory, MiB", "over the first tenth's", "recipes a second", "names known")


def measure(recipes: int, folder: Path, progress: Progress) -> Figures:
    """Serve the recipes and return a table with a row for each tenth of them."""
    subject = tiny(folder, anchors=ANCHORS)
    with vllm_server(subject, max_loras=SLOTS, max_num_seqs=CLIENTS, dtype="float32") as engine:
        lines = asyncio.run(_serve(engine, subject, recipes, progress))
    title = f"{recipes:,} distinct recipes through one engine: tiny model, {SLOTS} slots, {CLIENTS} clients"
    return Figures(title, COLUMNS, lines)


async def _serve(engine: Engine, subject: Subject, recipes: int, progress: Progress) -> list[list[object]]:
    bar = progress.add_task("recipes served", total=recipes)
    names, prompts = (recipe.name for recipe in subject.recipes()), Prompts(subject.model)
    tenth, lines, first_mib = recipes // TENTHS, list[list[object]](), 0.0
    async with loading(engine) as (loader,):
        warm = [Ask(name, prompts(8), TOKENS) for name in itertools.islice(names, 4 * CLIENTS)]
        await loader.closed_loop(iter(warm), CLIENTS)
        for number in range(1, TENTHS + 1):
            asks = (Ask(name, prompts(8), TOKENS) for name in itertools.islice(names, tenth))
            answers, seconds = await loader.closed_loop(asks, CLIENTS)
            progress.advance(bar, len(answers))
            mib = sum(memory_mib(pid) for pid in [engine.pid, *descendants(engine.pid)])
            first_mib = first_mib or mib
            lines.append([number * tenth, mib, mib / first_mib, len(answers) / seconds, engine.status()["names"]])
    return lines
