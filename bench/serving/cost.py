"""Measure the cost of a personal answer: the base model and recipes of a bank on the same server, in turn, in one run.

    first token    one request at a time, prompts of 150 and 400 tokens
    decode         mean ms between tokens in the second half of an answer, when all streams run: 1 stream; 8 streams of
                   one recipe; 16 streams over 4 recipes, and over 16

Every recipe is resident before it is timed, and no prompt is cached. `--without-lora` adds a vLLM started without LoRA,
as vLLM would serve only the base model; `--gateway` also measures a first token through the gateway. `--words` compares
each recipe with itself and a phrase table that proposes every token of its answer. `--rank` makes a bank of random rows
for the model, for each rank in turn; `--slots` is also measured in turn, with or without ranks.

The limit of a first token is the prompt's operations divided by the processor's speed; the limit of a decode step is
the bytes read (weights, KV cache, each adapter once) divided by the memory bandwidth. Both are measured first.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

from adapters.errors import MtaError
from bank.lookup.phrases import LONGEST, TrustedPhrases, phrase_table
from bench import script
from bench.page.report import Figures, Spread, tabulate
from bench.rig.engine import Engine
from bench.rig.limits import Limits, Model
from bench.rig.servers import vllm_server
from bench.rig.subject import BankOption, ModelOption, Subject, TinyOption, configured_subject, random_subject, tiny
from bench.serving.gateway import through_gateway
from bench.serving.load import Answer, Ask, Loader, Prompts, loading
from server.engine_protocol import BASE_MODEL, phrase_arguments

SHORT = 16
"""Tokens of the prompt in the decode rows."""

TRUST = (0.2, 0.5, 0.8, 0.9)
"""In phrases, by length, about what banks of mails have."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row: the number of concurrent streams and of recipes, and the quantity to read."""

    label: str
    streams: int
    recipes: int
    prompt: int
    tokens: int
    read: Literal["first", "gap"]


@dataclass(slots=True)
class Readings:
    """The paired readings of one case in ms; `plain` is only filled with `--without-lora`."""

    base: list[float] = field(default_factory=list)
    recipe: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)


LONG = Case("first token, prompt of 400 tokens", 1, 1, 400, 1, "first")


def cases(tokens: int) -> list[Case]:
    """Return all rows; answers of the decode rows have `tokens` tokens."""
    return [
        Case("first token, prompt of 150 tokens", 1, 1, 150, 1, "first"),
        LONG,
        Case("a token, 1 stream", 1, 1, SHORT, tokens, "gap"),
        Case("a token, 8 streams of one recipe", 8, 1, SHORT, tokens, "gap"),
        Case("first token, 8 streams of one recipe", 8, 1, SHORT, 2, "first"),
        Case("a token, 16 streams over 4 recipes", 16, 4, SHORT, tokens, "gap"),
        Case("a token, 16 streams over 16 recipes", 16, 16, SHORT, tokens, "gap"),
    ]


def main(
    *,
    bank: BankOption = None,
    model: ModelOption = None,
    tiny_model: TinyOption = False,
    rank: Annotated[
        list[int] | None, typer.Option(help="Measure a random bank of this rank instead; may be repeated.", min=1)
    ] = None,
    slots: Annotated[
        list[int] | None, typer.Option(help="Adapter slots; may be repeated.", min=1, show_default="16")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only rows with this text; may be repeated.")] = None,
    gateway: Annotated[bool, typer.Option("--gateway", help="Also through the gateway.")] = False,
    without_lora: Annotated[bool, typer.Option("--without-lora", help="Also a vLLM without LoRA.")] = False,
    words: Annotated[bool, typer.Option("--words", help="Recipes with a phrase table against those without.")] = False,
    pairs: Annotated[int, typer.Option(help="Turns of each side, after one for warm-up.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer in decode rows.", min=2)] = 24,
    dtype: Annotated[str, typer.Option(help="Data type of the served model.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = Path("out/bench/cost.json"),
) -> None:
    """Measure the base model against recipes, and both against the limits of the machine."""
    if tiny_model and (bank or model or rank):
        raise typer.BadParameter(
            "uses its own model and bank: leave out --bank, --model and --rank", param_hint="--tiny"
        )
    if words and (gateway or without_lora):
        raise typer.BadParameter(
            "compares a recipe with itself: leave out --gateway and --without-lora", param_hint="--words"
        )
    if bank and rank:
        raise typer.BadParameter("a bank is made for each rank: leave out --bank", param_hint="--rank")
    counts = slots or [16]
    chosen = _chosen(cases(tokens), only or [""], min(counts))
    tables, readings = [], {}
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        where = Path(scratch)
        if tiny_model:
            subjects = [tiny(where)]
        else:
            subjects = [random_subject(where, model, r) for r in rank] if rank else [configured_subject(bank, model)]
        shape = Model.read(subjects[0].model)
        limits = Limits.measured(shape)
        plan = Plan(chosen, pairs, dtype, without_lora, words, where / "gateway" if gateway else None)
        for subject, number in itertools.product(subjects, counts):
            title = f"{subject.title}, {number} slots, {dtype}" + (", base: recipes without phrases" if words else "")
            if words and not subject.manifest.phrases:
                raise MtaError(f"{subject.title} has no trust in phrases: build it again")
            taken = _one_engine(plan, subject, number, progress, title)
            lines = [_line(case, found, limits, shape, subject) for case, found in taken]
            tables.append(Figures(title, COLUMNS, lines))
            readings[title] = {case.label: asdict(found) for case, found in taken}
    note = (
        f"This machine reads {limits.bytes_per_s / 1e9:.1f} GB/s from memory and does "
        f"{limits.flops_per_s / 1e9:.0f} GFLOP/s in bf16."
    )
    typer.echo(note)
    tabulate(tables, out, bench="cost", note=note, limits=asdict(limits), pairs=pairs, tokens=tokens, readings=readings)


def _chosen(rows: Sequence[Case], texts: Sequence[str], slots: int) -> list[Case]:
    """Return the rows that contain any of these texts; each text must match, and one row must fit the fewest slots."""
    for text in texts:
        if not any(text in case.label for case in rows):
            raise typer.BadParameter(f"no row has the text {text!r}", param_hint="--only")
    chosen = [case for case in rows if any(text in case.label for text in texts)]
    if min(case.recipes for case in chosen) > slots:
        raise typer.BadParameter(f"no row of these has as few recipes as {slots}", param_hint="--slots")
    return chosen


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured on each engine; `gateway` is the folder for the gateway's store, None without it."""

    cases: Sequence[Case]
    pairs: int
    dtype: str
    without_lora: bool
    words: bool
    gateway: Path | None


COLUMNS = (
    "ms",
    "base",
    "recipe",
    "recipe over base",
    "without LoRA",
    "recipe over that",
    "limit, base",
    "limit, recipe",
    "recipe over its limit",
)


def _one_engine(
    plan: Plan, subject: Subject, slots: int, progress: Progress, title: str
) -> list[tuple[Case, Readings]]:
    """Measure every row that fits an engine's slots."""
    rows = [case for case in plan.cases if case.recipes <= slots]
    bar = progress.add_task(title, total=len(rows) * (plan.pairs + 1))
    settings: dict[str, Any] = {"max_loras": slots, "dtype": plan.dtype, "max_num_seqs": 16}
    with ExitStack() as servers:
        engines = [servers.enter_context(vllm_server(subject, **settings))]
        if plan.without_lora:
            engines.append(servers.enter_context(vllm_server(subject, "plain", **settings)))
        done = partial(progress.advance, bar)
        taken = [(case, asyncio.run(_measure(plan, case, subject, engines, done))) for case in rows]
        if plan.gateway:
            readings = Readings(*through_gateway(subject, engines[0], plan.gateway, LONG.prompt, plan.pairs))
            taken.append((replace(LONG, label=f"{LONG.label}, through the gateway"), readings))
    return taken


async def _measure(
    plan: Plan, case: Case, subject: Subject, engines: Sequence[Engine], done: Callable[[], object]
) -> Readings:
    """Measure base and recipe (and the server without LoRA) in turn, every other turn backwards; the first warms up.

    Each reading follows a short one that does not count, since the last ones went to another server.
    """
    names, prompts = subject.names(case.recipes), Prompts(subject.model)
    readings = Readings()
    async with loading(*engines) as loaders:
        if plan.words:
            fixed = prompts(case.prompt)  # a table proposes the answer to one prompt
            asks_with = [await _with_phrases(loaders[0], Ask(name, fixed, case.tokens)) for name in names]
            without = [replace(ask, body={}) for ask in asks_with]
        else:
            asks_with = [Ask(name, (), case.tokens) for name in names]
            without = [Ask(BASE_MODEL, (), case.tokens)]
        sides = [(readings.base, loaders[0], without), (readings.recipe, loaders[0], asks_with)]
        sides += [(readings.plain, loader, without) for loader in loaders[1:]]
        for turn in range(plan.pairs + 1):
            found = list[tuple[list[float], float | None]]()
            for kept, loader, asked in reversed(sides) if turn % 2 else sides:
                for tokens in (2, case.tokens):
                    asks = [replace(asked[i % len(asked)], tokens=tokens) for i in range(case.streams)]
                    asks = [ask if ask.prompt else replace(ask, prompt=prompts(case.prompt)) for ask in asks]
                    answers = await loader.together(asks)
                found.append((kept, _reading(case, answers)))
            values = [(kept, value) for kept, value in found if value is not None]
            if turn and len(values) == len(sides):
                for kept, value in values:
                    kept.append(value)
            done()
    if not readings.base:
        raise MtaError(f"{case.label}: all answers came in one piece; the machine is too busy to measure")
    return readings


async def _with_phrases(loader: Loader, ask: Ask) -> Ask:
    """Return the request with a phrase table that proposes every token of its answer, the most that one can cost."""
    ids = await loader.token_ids(ask)
    parts = [ids[at : at + 2 * LONGEST] for at in range(0, len(ids), LONGEST)]
    return replace(ask, body={"vllm_xargs": phrase_arguments(TrustedPhrases(phrase_table(parts * 2), TRUST))})


def _reading(case: Case, answers: Sequence[Answer]) -> float | None:
    """Return the median of first tokens, or of mean gaps in the second halves of answers.

    None if each answer came in one piece: a client on busy cores reads late.
    """
    if case.read == "first":
        return median(answer.first_ms for answer in answers)
    gaps = [fmean(answer.gaps_ms[len(answer.gaps_ms) // 2 :]) for answer in answers if answer.gaps_ms]
    return median(gaps) if gaps else None


def _line(case: Case, found: Readings, limits: Limits, shape: Model, subject: Subject) -> list[object]:
    """Return a row of the table."""
    if case.read == "first":
        prompt = case.prompt * case.streams
        floors = [shape.prompt_flops(prompt, bank) / limits.flops_per_s * 1000 for bank in (None, subject.manifest)]
    else:
        contexts = case.streams * (case.prompt + case.tokens // 2)
        floors = [
            shape.step_bytes(contexts, adapters, subject.manifest) / limits.bytes_per_s * 1000
            for adapters in (0, case.recipes)
        ]
    plain = Spread.of(found.plain) if found.plain else None
    return [
        case.label,
        Spread.of(found.base),
        Spread.of(found.recipe),
        Spread.ratio(found.recipe, found.base),
        plain,
        Spread.ratio(found.recipe, found.plain) if found.plain else None,
        *floors,
        Spread.of(found.recipe).median / floors[1],
    ]


if __name__ == "__main__":
    script(main)
