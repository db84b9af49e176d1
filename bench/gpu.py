"""The engine on a GPU, for anyone who has one: no weights and no bank are needed.

    python -m bench.gpu                                          # a tiny and an 8B-shaped Llama, 1 to 256 recipes
    python -m bench.gpu --shape tiny --recipes 1 --recipes 2     # a glance, on any machine

Each model is a shape with random weights (`--load-format dummy`) and gets a bank of 50 random anchors. Measured are the
cold path, from the engine's own histograms, and tokens a second of a closed loop whose clients share 1 to 256 recipes,
in turn with the base model on the same server. Then the same on a vLLM without the plugin, with PEFT folders.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

from bank.manifest import read_manifest
from bank.models.folders import ensure_embedder
from bench import script
from bench.report import Figures, Spread, tabulate
from bench.rig.engine import Engine
from bench.rig.servers import Flavour, vllm_server
from bench.rig.subject import Subject
from bench.rig.tiny import hollow_model, tiny_bank
from bench.serving.histograms import COLD_PATH, ON_THE_LOOP, means_ms, totals
from bench.serving.load import Ask, Prompts, loading
from bench.serving.peft_folders import peft_folders
from server.engine_protocol import BASE_MODEL
from server.settings import Settings

NEVER_SEEN = 20
"""Recipes that the cold path is measured on."""


class Shape(StrEnum):
    """Models by their shape."""

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
    """The closed loop: clients, requests in a block, tokens of prompts and answers, turns."""

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
    rank: Annotated[int, typer.Option(help="Their rank.", min=1)] = 8,
    slots: Annotated[int | None, typer.Option(help="Adapter slots.", min=1, show_default="as many as recipes")] = None,
    clients: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 256,
    requests: Annotated[int, typer.Option(help="Requests in a block.", min=1)] = 512,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 64,
    pairs: Annotated[int, typer.Option(help="Turns, after one for warm-up.", min=1)] = 5,
    peft: Annotated[bool, typer.Option("--peft/--no-peft", help="Also a stock vLLM with PEFT folders.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = Path("out/bench/gpu.json"),
) -> None:
    """Measure the cold path and the throughput of many recipes, against the base model and PEFT folders."""
    counts, load = sorted(recipes or [1, 4, 16, 64, 256]), Load(clients, requests, prompt, tokens, pairs)
    settings = {"max_loras": slots or counts[-1], "max_num_seqs": clients, "max_model_len": prompt + tokens + 32}
    tables = []
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        for one in shape or list(Shape):
            where = Path(scratch) / one.value
            subject = _subject(where, one, anchors, rank)

            def server(flavour: Flavour, subject: Subject = subject) -> AbstractContextManager[Engine]:
                return vllm_server(subject, flavour, arguments=("--load-format", "dummy"), **settings)

            bar = progress.add_task(f"{one.value}: in turn with base", total=(1 + peft) * len(counts) * (pairs + 1))
            done = lambda bar=bar: progress.advance(bar)  # noqa: E731
            lines = []
            with server("ours") as ours:
                tables.append(_cold(one, ours, subject, prompt))
                names = subject.names(counts[-1])
                lines += asyncio.run(_throughput("recipes", ours, subject, names, counts=counts, load=load, done=done))
            if peft:
                folders = peft_folders(subject, where / "peft", counts[-1])
                with server("stock") as stock:
                    for folder in progress.track(folders, description="vLLM loads the folders"):
                        body = {"lora_name": folder.name, "lora_path": str(folder)}
                        stock.client.post("/v1/load_lora_adapter", json=body).raise_for_status()
                    names = [folder.name for folder in folders]
                    lines += asyncio.run(
                        _throughput("PEFT folders", stock, subject, names, counts=counts, load=load, done=done)
                    )
            title = (
                f"{one.value}, bf16, rank {rank} in {settings['max_loras']} slots of {subject.manifest.serving_rank}, "
                f"{clients} clients, prompts of {prompt} tokens, answers of {tokens}: tokens a second"
            )
            tables.append(Figures(title, ("adapters", "how many", "base", "adapters ", "over base"), lines))
    tabulate(tables, out, bench="gpu", device=_device())


def _subject(where: Path, shape: Shape, anchors: int, rank: int) -> Subject:
    model = hollow_model(where / "model", **SHAPES[shape])
    embedder = ensure_embedder(Settings().embedder, Settings().cache_dir)
    vectors = np.random.default_rng(0).standard_normal((anchors, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    bank = tiny_bank(
        where / "bank",
        model,
        embedder,
        anchors=anchors,
        rank=rank,
        user_rank=0,
        scale=0.01,
        name=f"Llama, {shape.value}",
        embeddings=vectors,
    )
    return Subject(bank, model, read_manifest(bank))


def _cold(shape: Shape, engine: Engine, subject: Subject, prompt: int) -> Figures:
    """The steps from a never-seen recipe to its adapter, µs, as the engine counts them."""
    names = COLD_PATH | ON_THE_LOOP
    prompts, taken = Prompts(subject.model), {step: list[float]() for step in names}
    for recipe in itertools.islice(subject.recipes(seed=1), NEVER_SEEN):
        before = totals(engine.client.get("/metrics").text, names)
        body = {"model": recipe.name, "prompt": prompts(prompt), "max_tokens": 1}
        engine.client.post("/v1/completions", json=body).raise_for_status()
        after = totals(engine.client.get("/metrics").text, names)
        for step, ms in means_ms(before, after).items():
            taken[step].append(1000 * ms)
    lines = [[step, Spread.of(readings) if readings else None] for step, readings in taken.items()]
    return Figures(f"{shape.value}: a never-seen recipe, {NEVER_SEEN} times", ("step", "µs"), lines)


async def _throughput(
    what: str,
    engine: Engine,
    subject: Subject,
    names: Sequence[str],
    *,
    counts: Sequence[int],
    load: Load,
    done: Callable[[], object],
) -> list[list[object]]:
    """Tokens a second over 1, 4, … adapters in turn with the base model; a row for each."""
    prompts, lines = Prompts(subject.model), list[list[object]]()
    async with loading(engine) as (loader,):
        for count in counts:
            rates: tuple[list[float], list[float]] = ([], [])
            for turn in range(load.pairs + 1):
                for kept, models in zip(rates, ([BASE_MODEL], names[:count]), strict=True):
                    asks = (
                        Ask(models[i % len(models)], prompts(load.prompt), load.tokens) for i in range(load.requests)
                    )
                    answers, seconds = await loader.closed_loop(asks, load.clients)
                    if turn:
                        kept.append(sum(answer.tokens for answer in answers) / seconds)
                done()
            base, adapted = rates
            lines.append([what, count, Spread.of(base), Spread.of(adapted), Spread.ratio(adapted, base)])
    return lines


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    script(main)
