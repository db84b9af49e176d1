"""Measure more users than slots: 8, 16, 80 and 800 users in turn on 8 slots, compared with a stock vLLM.

Our engine has a recipe for each user. The stock vLLM has the same options, its own LoRA, and a PEFT folder of the same
rank for each user, loaded before the measurement (most files are links to a few, which stay in the page cache). Blocks
alternate between both servers at every number of users, in several rounds. A block is a closed loop of clients over the
users in turn: with 80 users, each is served again after 79 others. With as many clients as slots, this measures the
cost of loading adapters; with more clients, also the limit of a batch to as many adapters as slots.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from bench import script
from bench.page.report import Figures, Spread, percentile, tabulate
from bench.rig.engine import Engine
from bench.rig.servers import vllm_server
from bench.rig.subject import BankOption, ModelOption, Subject, TinyOption, configured_subject, tiny
from bench.serving.load import Ask, Loader, Prompts, loading
from bench.serving.peft_folders import load_folders, peft_folders


@dataclass(slots=True)
class Level:
    """Readings of one server at one number of users, per stream and per block."""

    first_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


COLUMNS = (
    "users",
    "server",
    "first token p50, ms",
    "first token p99, ms",
    "inter-token p50, ms",
    "inter-token p99, ms",
    "tokens/s",
)


def main(
    *,
    bank: BankOption = None,
    model: ModelOption = None,
    tiny_model: TinyOption = False,
    users: Annotated[
        list[int] | None, typer.Option(help="Users that take turns; may be repeated.", show_default="8, 16, 80, 800")
    ] = None,
    slots: Annotated[int, typer.Option(help="Adapter slots.", min=1)] = 8,
    clients: Annotated[
        int | None, typer.Option(help="Concurrent requests.", min=1, show_default="as many as slots")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests in a block.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="Blocks of each kind, after one for warm-up.", min=1)] = 5,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 16,
    dtype: Annotated[str, typer.Option(help="Data type of the served model.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = Path("out/bench/thrash.json"),
) -> None:
    """Measure time to first token and tokens per second as more users share the slots."""
    levels, clients = sorted(users or [8, 16, 80, 800]), clients or slots
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress, ExitStack() as servers:
        subject = tiny(Path(scratch), anchors=64) if tiny_model else configured_subject(bank, model)
        running: dict[str, Any] = {"max_loras": slots, "dtype": dtype, "max_num_seqs": clients}
        ours = servers.enter_context(vllm_server(subject, **running))
        stock = servers.enter_context(vllm_server(subject, "stock", **running))
        sides = {"ours": ours, "stock vLLM": stock}
        folders = peft_folders(subject, Path(scratch) / "peft", levels[-1])
        names = {"ours": subject.names(levels[-1]), "stock vLLM": [folder.name for folder in folders]}
        load_folders(stock, folders, progress)
        bar = progress.add_task("blocks in turn", total=(rounds + 1) * len(levels) * len(sides))
        load = Load(subject, rounds, clients, requests, prompt, tokens)
        measured = asyncio.run(_measure(sides, names, levels, load, lambda: progress.advance(bar)))
    first = levels[0]
    lines = [_line(count, side, measured[side, count], measured[side, first]) for count in levels for side in sides]
    title = (
        f"{subject.title}, {dtype}, {slots} slots, {clients} clients: {rounds} blocks of {requests} requests, "
        f"prompts of {prompt} tokens, answers of {tokens}"
    )
    raw = {f"{side}, {count}": level.tokens_per_s for (side, count), level in measured.items()}
    columns = (*COLUMNS, f"tokens/s over {first} users'")
    tabulate([Figures(title, columns, lines)], out, bench="thrash", tokens_per_s=raw)


@dataclass(frozen=True, slots=True)
class Load:
    """The number of blocks and the requests of each."""

    subject: Subject
    rounds: int
    clients: int
    requests: int
    prompt: int
    tokens: int


async def _measure(
    sides: dict[str, Engine],
    names: dict[str, list[str]],
    levels: Sequence[int],
    load: Load,
    done: Callable[[], object],
) -> dict[tuple[str, int], Level]:
    levels_by = {(side, count): Level() for side in sides for count in levels}
    prompts = Prompts(load.subject.model)
    turns = {key: itertools.cycle(range(key[1])) for key in levels_by}  # each block continues with the next user
    async with loading(*sides.values()) as loaders:
        for turn, count in itertools.product(range(load.rounds + 1), levels):
            for side, loader in zip(sides, loaders, strict=True):
                asks = _asks(names[side], turns[side, count], prompts, load)
                await _block(loader, asks, load.clients, levels_by[side, count] if turn else Level())
                done()
    return levels_by


def _asks(names: Sequence[str], turns: Iterator[int], prompts: Prompts, load: Load) -> Iterator[Ask]:
    for _ in range(load.requests):
        yield Ask(names[next(turns)], prompts(load.prompt), load.tokens)


async def _block(loader: Loader, asks: Iterator[Ask], clients: int, level: Level) -> None:
    answers, seconds = await loader.closed_loop(asks, clients)
    level.first_ms += [answer.first_ms for answer in answers]
    level.gaps_ms += [gap for answer in answers for gap in answer.gaps_ms]
    level.tokens_per_s.append(sum(answer.tokens for answer in answers) / seconds)


def _line(users: int, side: str, level: Level, first: Level) -> list[object]:
    """Return a row of the table; the last column compares the blocks of a round."""
    latencies = [percentile(kept, fraction) for kept in (level.first_ms, level.gaps_ms) for fraction in (0.5, 0.99)]
    rate = Spread.of(level.tokens_per_s)
    return [users, side, *latencies, rate, Spread.ratio(level.tokens_per_s, first.tokens_per_s)]


if __name__ == "__main__":
    script(main)
