"""Measure an engine with many recipes beside PEFT folders on stock vLLM; needs no weights and no bank.

    python -m bench.serving.recipes                                        # a tiny and an 8B-shaped Llama, on a GPU
    python -m bench.serving.recipes --shape tiny --recipes 1 --recipes 2   # a quick run on any machine

Each model is a shape with random weights (`--load-format dummy`) and gets a bank of 50 random anchors. The benchmark
measures the cold path with the engine's own histograms, and tokens per second of a closed loop whose clients share 1 to
256 recipes, in turn with the base model on the same server. It repeats this on a vLLM without the plugin, with PEFT
folders.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

from bench import script
from bench.page.report import Figures, Spread, tabulate
from bench.rig.engine import Engine
from bench.rig.servers import Flavour, vllm_server
from bench.rig.subject import Subject, random_rows
from bench.rig.tiny import weightless_model
from bench.serving.histograms import BLOCKING_STEPS, COLD_PATH, means_ms, totals
from bench.serving.load import Ask, Loader, Prompts, loading
from bench.serving.peft_folders import load_folders, peft_folders
from server.engine_protocol import BASE_MODEL

NEW_RECIPES = 20
"""Number of recipes for measuring the cold path."""


class Shape(StrEnum):
    """Shape of a model."""

    TINY = "tiny"
    LLAMA_8B = "8b"


SHAPES = {
    Shape.TINY: {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    Shape.LLAMA_8B: {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}


@dataclass(frozen=True, slots=True)
class Load:
    """The closed loop: clients, requests per block, tokens per prompt and per answer, and turns."""

    clients: int
    requests: int
    prompt: int
    tokens: int
    pairs: int


def main(
    *,
    shape: Annotated[list[Shape] | None, typer.Option(help="May be repeated.", show_default="both")] = None,
    recipes: Annotated[
        list[int] | None, typer.Option(help="May be repeated.", min=1, show_default="1, 4, 16, 64, 256")
    ] = None,
    anchors: Annotated[int, typer.Option(help="Anchors of the bank.", min=2)] = 50,
    rank: Annotated[int, typer.Option(help="Rank of the anchors.", min=1)] = 8,
    slots: Annotated[int | None, typer.Option(help="Adapter slots.", min=1, show_default="as many as recipes")] = None,
    clients: Annotated[int, typer.Option(help="Concurrent requests.", min=1)] = 256,
    requests: Annotated[int, typer.Option(help="Requests in a block.", min=1)] = 512,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 64,
    pairs: Annotated[int, typer.Option(help="Turns, after one for warm-up.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = Path("out/bench/recipes.json"),
) -> None:
    """Measure the cold path and the throughput of many recipes, against the base model and PEFT folders."""
    counts, load = sorted(recipes or [1, 4, 16, 64, 256]), Load(clients, requests, prompt, tokens, pairs)
    tables = []
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        for one in shape or list(Shape):
            subject = _subject(Path(scratch) / one.value, one, anchors, rank)
            measured = _Measured(subject, counts, load, slots or counts[-1], progress)
            with measured.server("ours") as ours:
                tables.append(_cold(one, ours, subject, prompt))
                lines = measured.in_turn("recipes", ours, subject.names(counts[-1]))
            folders = peft_folders(subject, Path(scratch) / one.value / "peft", counts[-1])
            with measured.server("stock") as stock:
                load_folders(stock, folders, progress)
                lines += measured.in_turn("PEFT folders", stock, [folder.name for folder in folders])
            title = (
                f"{subject.title}, bfloat16, {measured.slots} slots, {clients} clients, prompts of {prompt} tokens, "
                f"answers of {tokens}: tokens a second"
            )
            tables.append(Figures(title, ("adapters", "how many", "base", "with adapters", "over base"), lines))
    tabulate(tables, out, bench="recipes")


@dataclass(frozen=True, slots=True)
class _Measured:
    """One model's servers and their load."""

    subject: Subject
    counts: Sequence[int]
    load: Load
    slots: int
    progress: Progress

    def server(self, flavour: Flavour) -> AbstractContextManager[Engine]:
        """Return a server with dummy weights."""
        load = self.load
        sizes = {"max_num_seqs": load.clients, "max_model_len": load.prompt + load.tokens + 32}
        hollow = ("--load-format", "dummy")
        return vllm_server(self.subject, flavour, arguments=hollow, max_loras=self.slots, **sizes)

    def in_turn(self, what: str, engine: Engine, names: Sequence[str]) -> list[list[object]]:
        """Measure tokens per second with 1, 4, … adapters in turn with the base model; return a row for each."""
        turns = self.load.pairs + 1
        bar = self.progress.add_task(f"{what} in turn with base", total=len(self.counts) * turns)
        prompts, lines = Prompts(self.subject.model), list[list[object]]()

        async def measure() -> None:
            async with loading(engine) as (loader,):
                for count in self.counts:
                    base, adapted = list[float](), list[float]()
                    for turn in range(turns):
                        for kept, models in ((base, [BASE_MODEL]), (adapted, names[:count])):
                            rate = await _block(loader, models, prompts, self.load)
                            if turn:
                                kept.append(rate)
                        self.progress.advance(bar)
                    lines.append([what, count, Spread.of(base), Spread.of(adapted), Spread.ratio(adapted, base)])

        asyncio.run(measure())
        return lines


async def _block(loader: Loader, models: Sequence[str], prompts: Prompts, load: Load) -> float:
    """Return the tokens per second of a closed loop over some adapters."""
    asks = (Ask(models[i % len(models)], prompts(load.prompt), load.tokens) for i in range(load.requests))
    answers, seconds = await loader.closed_loop(asks, load.clients)
    return sum(answer.tokens for answer in answers) / seconds


def _subject(where: Path, shape: Shape, anchors: int, rank: int) -> Subject:
    model = weightless_model(where / "model", **SHAPES[shape])
    vectors = np.random.default_rng(0).standard_normal((anchors, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return random_rows(where / "bank", model, f"Llama, {shape.value}", anchors=anchors, rank=rank, embeddings=vectors)


def _cold(shape: Shape, engine: Engine, subject: Subject, prompt: int) -> Figures:
    """Measure the steps from a new recipe to its adapter in µs, with the engine's histograms."""
    names = COLD_PATH | BLOCKING_STEPS
    prompts, taken = Prompts(subject.model), {step: list[float]() for step in names}
    for recipe in itertools.islice(subject.recipes(seed=1), NEW_RECIPES):
        before = totals(engine.client.get("/metrics").text, names)
        body = {"model": recipe.name, "prompt": prompts(prompt), "max_tokens": 1}
        engine.client.post("/v1/completions", json=body).raise_for_status()
        after = totals(engine.client.get("/metrics").text, names)
        for step, ms in means_ms(before, after).items():
            taken[step].append(1000 * ms)
    lines = [[step, Spread.of(readings) if readings else None] for step, readings in taken.items()]
    return Figures(f"{shape.value}: a never-seen recipe, {NEW_RECIPES} times", ("step", "µs"), lines)


if __name__ == "__main__":
    script(main)
