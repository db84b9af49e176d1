"""Measure what an app's users share: first tokens behind one system prompt, wherever the bank's personal part acts.

    mta bench shared --bank BANK

For each of `everywhere`, `after_system` and `answer` an engine serves the bank as if it had been built so. First 100
users ask once each, which tells how many tokens each of them adds to the KV cache, and after which no slot is unused.
Then the base model, whose cache holds the system prompt, a user never seen before, and the same user again are asked in
turn, and one talks for ten turns.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from transformers import AutoTokenizer

from adapters.training.example import Acts
from bank.items.prompt import opening
from bank.manifest import write_manifest
from bench import script
from bench.page.report import Figures, Spread, tabulate
from bench.rig.engine import Engine
from bench.rig.servers import vllm_server
from bench.rig.subject import BankOption, ModelOption, Subject, TinyOption, configured_subject, tiny
from server.engine_protocol import BASE_MODEL

RULE = "Answer kindly, in whole sentences, and never promise what the shop cannot keep. "
COLUMNS = (
    *("acts", "system prompt, tokens", "base, ms", "never seen, ms", "over base", "seen, ms"),
    *("tokens read a user", "ten turns, ms"),
)
_questions = (f"Question {number}: when do you open on day {number}?" for number in itertools.count())


def main(
    *,
    bank: BankOption = None,
    model: ModelOption = None,
    tiny_model: TinyOption = False,
    system: Annotated[str, typer.Option(help="Tokens of the system prompts.")] = "500,1500",
    acts: Annotated[str, typer.Option(help="Where the personal part acts.")] = ",".join(Acts),
    pairs: Annotated[int, typer.Option(help="Turns of each side, after one for warm-up.", min=1)] = 9,
    users: Annotated[int, typer.Option(help="Users who ask once each.", min=1)] = 100,
    block: Annotated[int | None, typer.Option(help="Tokens of a KV block.", show_default="the engine's")] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the served model.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = Path("out/bench/shared.json"),
) -> None:
    """Measure."""
    lines, arguments = [], ("--block-size", str(block)) if block else ()
    with tempfile.TemporaryDirectory() as scratch:
        subject = tiny(Path(scratch)) if tiny_model else configured_subject(bank, model)
        tokenizer = AutoTokenizer.from_pretrained(subject.model)
        prompts = [_system(tokenizer, int(count)) for count in system.split(",")]
        for acts_from in map(Acts, acts.split(",")):
            served = _acting(subject, acts_from, Path(scratch) / acts_from)
            with vllm_server(served, dtype=dtype, arguments=arguments) as engine:
                recipes = (recipe.name for recipe in served.recipes())
                for prompt in track(prompts, acts_from):
                    measured = _measured(engine, recipes, prompt, pairs, users)
                    lines.append([acts_from, len(opening(tokenizer, [prompt])), *measured])
    tabulate(
        [Figures(f"{subject.title}, {dtype}, blocks of {block or 'its own size'}", COLUMNS, lines)], out, bench="shared"
    )


def _system(tokenizer: Any, tokens: int) -> dict[str, str]:
    rules = RULE * (1 + tokens // len(tokenizer.encode(RULE)))
    return {"role": "system", "content": tokenizer.decode(tokenizer.encode(rules)[:tokens])}


def _acting(subject: Subject, acts: Acts, folder: Path) -> Subject:
    """Return the bank as if it had been built so: what is measured does not depend on the numbers in its rows."""
    folder.mkdir()
    for file in subject.manifest.files:
        (folder / file).symlink_to((subject.bank / file).resolve())
    acting = subject.manifest.model_copy(update={"training": {**subject.manifest.training, "acts": acts}})
    return replace(subject, bank=folder, manifest=write_manifest(folder, acting))


def _measured(
    engine: Engine, recipes: Iterator[str], system: dict[str, str], pairs: int, users: int
) -> Iterator[object]:
    """Yield a line's figures."""
    _first_token_ms(engine, next(recipes), system)  # who reads what is shared
    before = _computed(engine)
    for recipe in itertools.islice(recipes, users):
        _first_token_ms(engine, recipe, system)
    computed = round((_computed(engine) - before) / users, 1)
    base, new, seen = list[float](), list[float](), list[float]()
    for _ in range(1 + pairs):
        recipe = next(recipes)
        for series, model in ((base, BASE_MODEL), (new, recipe), (seen, recipe)):
            series.append(_first_token_ms(engine, model, system))
    yield Spread.of(base[1:])
    yield Spread.of(new[1:])
    yield Spread.ratio(new[1:], base[1:])
    yield Spread.of(seen[1:])
    yield computed
    turns, talker = list[dict[str, str]](), next(recipes)
    taken = []
    for _ in range(10):
        turns.append({"role": "user", "content": next(_questions)})
        taken.append(_first_token_ms(engine, talker, system, *turns))
        turns.append({"role": "assistant", "content": "We do."})
    yield round(sum(taken), 1)


def _first_token_ms(engine: Engine, model: str, system: dict[str, str], *turns: dict[str, str]) -> float:
    messages = [system, *(turns or [{"role": "user", "content": next(_questions)}])]
    start = time.perf_counter()
    engine.chat(model, messages=messages, max_tokens=1).raise_for_status()
    return (time.perf_counter() - start) * 1000


def _computed(engine: Engine) -> float:
    """Return the number of prompt tokens that the prefix cache did not have."""
    return engine.metric("vllm:prefix_cache_queries_total") - engine.metric("vllm:prefix_cache_hits_total")


if __name__ == "__main__":
    script(main)
