"""Measure the delay that new users cause for running streams: gaps between the tokens of warm streams.

Three kinds of blocks alternate. While a few warm streams run, requests with a short prompt and one token arrive as a
Poisson process: in the first block from new users, in the second from users whose recipes are resident, in the third
there are none. The cost is the ratio of the gaps' p99 in the first two blocks of a turn.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.progress import Progress

from bench import script
from bench.page.report import Figures, Spread, percentile, tabulate
from bench.rig.servers import vllm_server
from bench.rig.subject import BankOption, ModelOption, TinyOption, configured_subject, tiny
from bench.serving.histograms import BLOCKING_STEPS
from bench.serving.load import Answer, Ask, Loader, Prompts, loading

KINDS = ("never-seen users", "resident users", "nobody")
RESIDENT = 4
"""Number of resident users' recipes, including those of the warm streams."""


def main(
    *,
    bank: BankOption = None,
    model: ModelOption = None,
    tiny_model: TinyOption = False,
    per_s: Annotated[float, typer.Option(help="Arrivals a second.", min=0.1)] = 5,
    arrivals: Annotated[int, typer.Option(help="Arrivals in a block.", min=1)] = 25,
    streams: Annotated[int, typer.Option(help="Warm streams.", min=1, max=RESIDENT)] = 2,
    prompt: Annotated[int, typer.Option(help="Tokens of the arrivals' prompts.", min=1)] = 32,
    pairs: Annotated[int, typer.Option(help="Turns, after one for warm-up.", min=1)] = 5,
    slots: Annotated[int, typer.Option(help="Adapter slots.", min=RESIDENT + 1)] = 16,
    dtype: Annotated[str, typer.Option(help="Data type of the served model.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = Path("out/bench/stall.json"),
) -> None:
    """Measure inter-token p50 and p99 of warm streams during arrivals."""
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        subject = tiny(Path(scratch), anchors=64) if tiny_model else configured_subject(bank, model)
        bar = progress.add_task("blocks in turn", total=len(KINDS) * (pairs + 1))
        with vllm_server(subject, max_loras=slots, dtype=dtype, max_num_seqs=16) as engine:

            def waited_ms() -> float:
                """Return the total time that steps have waited for adapters."""
                return 1000 * sum(engine.metric(f"{name}_sum") for name in BLOCKING_STEPS.values())

            async def measure() -> dict[str, list[_Block]]:
                recipes, prompts = (recipe.name for recipe in subject.recipes()), Prompts(subject.model)
                resident = [next(recipes) for _ in range(RESIDENT)]
                blocks: dict[str, list[_Block]] = {kind: [] for kind in KINDS}
                async with loading(engine) as (loader,):
                    for turn in range(pairs + 1):
                        for kind in KINDS:
                            await loader.together(Ask(name, prompts(prompt), 2) for name in resident)
                            names = _names(kind, arrivals, recipes, resident)
                            asks = [Ask(name, prompts(prompt), 1) for name in names]
                            before_ms = waited_ms()
                            answers, gaps = await _block(
                                loader,
                                resident[:streams],
                                prompts,
                                asks=asks,
                                per_s=per_s,
                                seconds=arrivals / per_s,
                            )
                            if turn:
                                blocks[kind].append(_Block(answers, gaps, waited_ms() - before_ms))
                            progress.advance(bar)
                return blocks

            measured = asyncio.run(measure())
    p99 = {kind: [percentile(block.gaps_ms, 0.99) for block in blocks] for kind, blocks in measured.items()}
    lines: list[list[object]] = []
    for kind, blocks in measured.items():
        firsts = [answer.first_ms for block in blocks for answer in block.answers]
        over = [Spread.ratio(p99[kind], p99[other]) if kind != other else None for other in KINDS[1:]]
        p50, longest = (Spread.of([of(block.gaps_ms) for block in blocks]) for of in (median, max))
        waited = Spread.of([block.waited_ms for block in blocks])
        lines.append([kind, p50, Spread.of(p99[kind]), *over, longest, waited, Spread.of(firsts) if firsts else None])
    title = (
        f"{subject.title}, {dtype}, {slots} slots, {streams} warm streams: {pairs} blocks of {arrivals} arrivals at "
        f"{per_s:g} a second, prompts of {prompt} tokens"
    )
    columns = (
        "who arrives",
        "inter-token p50, ms",
        "p99, ms",
        "p99 over resident's",
        "p99 over nobody's",
        "longest, ms",
        "steps waited for adapters, ms a block",
        "first token of who arrives, ms",
    )
    tabulate([Figures(title, columns, lines)], out, bench="stall", p99_ms=p99)


@dataclass(frozen=True, slots=True)
class _Block:
    """Answers to a block's arrivals, gaps of the warm streams, and total wait of steps for adapters."""

    answers: list[Answer]
    gaps_ms: list[float]
    waited_ms: float


def _names(kind: str, count: int, recipes: Iterator[str], resident: Sequence[str]) -> list[str]:
    """Return the recipes of a block's arrivals."""
    if kind == KINDS[0]:
        return [next(recipes) for _ in range(count)]
    return [resident[i % len(resident)] for i in range(count)] if kind == KINDS[1] else []


async def _block(
    loader: Loader,
    warm: Sequence[str],
    prompts: Prompts,
    *,
    asks: Sequence[Ask],
    per_s: float,
    seconds: float,
) -> tuple[list[Answer], list[float]]:
    """Return the arrivals' answers and the gaps of the warm streams, which run until all arrivals are answered."""
    gaps: list[float] = []
    over = asyncio.Event()

    async def stream(name: str) -> None:
        while not over.is_set():
            gaps.extend((await loader.stream(Ask(name, prompts(8), 32))).gaps_ms)

    warm_streams = asyncio.gather(*map(stream, warm))
    answers = await loader.arriving(asks, per_s)
    if not asks:
        await asyncio.sleep(seconds)
    over.set()
    await warm_streams
    return answers, gaps


if __name__ == "__main__":
    script(main)
