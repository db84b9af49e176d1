"""Measure the time until a new recipe's adapter is usable in a running server: up to three ways in turn, in one run.

    worker   this server: prepare, and fuse inside the worker
    merge    merge the same anchors into a PEFT folder, then let vLLM load it
    disk     let vLLM load a PEFT folder that was merged beforehand

From inside: the engine's own histograms of each step, read before and after every turn. From outside: the time to the
first token of a request with the new adapter, minus the same with the resident adapter, for all three ways. The
difference is the cost of the adapter plus noise, which a prompt of one token keeps low. Method, rows and rank are
always the same. `merge` and `disk` run on a vLLM with the same options but without the plugin. Time to first token,
cold and warm, is that of an uncached chat prompt of normal length.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from adapters.fusion import fuse
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe
from bank.matrix import open_matrix
from bench import script
from bench.page.report import Spread, report
from bench.rig.engine import Engine
from bench.rig.limits import BF16_BYTES, Limits, Model
from bench.rig.servers import vllm_server
from bench.rig.subject import BankOption, ModelOption, Subject, TinyOption, configured_subject, random_subject, tiny
from bench.serving.histograms import BLOCKING_STEPS, COLD_PATH, Total, means_ms, totals
from bench.serving.peft_folders import write_peft
from server.engine_protocol import BASE_MODEL

PROMPT = "Write two sentences about the weather of tomorrow and what to wear for it."
SLOTS, HELD = 4, 8
RIVALS = {"merge": "merge to a PEFT folder, vLLM loads it", "disk": "vLLM loads a folder merged before"}
_salts = itertools.count()


def main(
    *,
    bank: BankOption = None,
    model: ModelOption = None,
    tiny_model: TinyOption = False,
    directions: Annotated[
        int | None, typer.Option(help="Measure a bank of so many random directions instead.", min=1)
    ] = None,
    pairs: Annotated[int, typer.Option(help="Timed repetitions of each way, after a warm-up.", min=1)] = 15,
    rivals: Annotated[bool, typer.Option(help="Also measure `merge` and `disk`.")] = True,
    dtype: Annotated[str, typer.Option(help="Data type of the served model.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = Path("out/bench/cold.json"),
) -> None:
    """Measure the time until a never-seen recipe is usable, against merging and loading a PEFT folder."""
    if directions and (bank or tiny_model):
        raise typer.BadParameter("makes a bank of its own: leave out --bank and --tiny", param_hint="--directions")
    readings: dict[str, list[float]] = {way: [] for way in ("worker", *(RIVALS if rivals else ()), "cold", "warm")}
    inside: dict[str, list[float]] = {step: [] for step in (*COLD_PATH, *BLOCKING_STEPS)}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        where = Path(scratch)
        if directions:
            subject = random_subject(where, model, directions=directions)
        else:
            subject = tiny(where) if tiny_model else configured_subject(bank, model)
        manifest, matrix = subject.manifest, open_matrix(subject.bank, subject.manifest)
        limits = Limits.measured(Model.read(subject.model))
        recipes = subject.recipes()
        settings: dict[str, Any] = {"dtype": dtype, "max_loras": SLOTS, "max_cpu_loras": HELD}
        torch.set_num_threads(1)  # the engines occupy the other cores
        ours = servers.enter_context(vllm_server(subject, **settings))
        stock = servers.enter_context(vllm_server(subject, "stock", **settings)) if rivals else None
        for recipe in itertools.islice(recipes, HELD):
            _first_token_ms(ours, recipe.name)
        for pair in track(range(pairs + 2), "The ways in turn"):
            before = _totals(ours)
            taken = {"worker": _until_usable_ms(ours, next(recipes).name)}
            steps = means_ms(before, _totals(ours))
            if stock:
                taken["merge"] = _merge_and_load_ms(stock, matrix, next(recipes), where / f"merge-{pair}", subject)
                disk = where / f"disk-{pair}"
                write_peft(disk, fuse(matrix, next(recipes)), manifest.base_model.name)
                taken["disk"] = _load_ms(stock, disk)
            name = next(recipes).name
            _wake(ours)
            taken |= {"cold": _first_token_ms(ours, name, chat=True), "warm": _first_token_ms(ours, name, chat=True)}
            if pair >= 2:  # the first two are for warm-up
                for way, value in taken.items():
                    readings[way].append(value)
                for step, value in steps.items():
                    inside[step].append(value)
    rows = "directions" if manifest.directions else "anchors"
    terms = f"{subject.merged_rows} {rows}{' and the common row' if manifest.common else ''}"
    report(
        f"Until a never-seen recipe is usable, ms: {manifest.base_model.name}, {dtype}, {manifest.method.value}, "
        f"{terms}, rank {manifest.rank}, slots of rank {manifest.serving_rank}",
        [*_inside(inside), *_limit(subject, limits), *_outside(readings)],
        out,
        bench="cold",
        readings=readings,
        inside=inside,
    )


def _inside(inside: dict[str, list[float]]) -> Iterator[tuple[str, object]]:
    """Yield the rows from the engine's own histograms."""
    for step, taken in inside.items():
        yield f"in the engine: {step}", Spread.of(taken) if taken else "no histogram"


def _limit(subject: Subject, limits: Limits) -> Iterator[tuple[str, object]]:
    """Yield the memory traffic of fusing: each row is read, the sum is written and copied into the slot."""
    manifest, numbers = subject.manifest, subject.manifest.layout.row_numbers
    read = subject.merged_rows * (1 if manifest.directions else BF16_BYTES)  # directions are read in int8
    moved = numbers * (read + BF16_BYTES * (manifest.common + 3))
    yield "bytes that fusing and the slot move, MiB", round(moved / 2**20, 2)
    yield "the same at this machine's memory bandwidth, ms", round(1000 * moved / limits.bytes_per_s, 3)


def _outside(readings: dict[str, list[float]]) -> Iterator[tuple[str, object]]:
    """Yield the rows of differences between latencies."""
    yield "worker: prepare and fuse", Spread.of(readings["worker"])
    rivals = {way: told for way, told in RIVALS.items() if way in readings}
    yield from ((told, Spread.of(readings[way])) for way, told in rivals.items())
    yield from ((f"{way} over worker", Spread.ratio(readings[way], readings["worker"])) for way in rivals)
    yield "time to first token, cold", Spread.of(readings["cold"])
    yield "time to first token, warm", Spread.of(readings["warm"])
    yield "cold over warm", Spread.ratio(readings["cold"], readings["warm"])


def _totals(engine: Engine) -> dict[str, Total]:
    return totals(engine.client.get("/metrics").text, COLD_PATH | BLOCKING_STEPS)


def _first_token_ms(engine: Engine, model: str, *, chat: bool = False) -> float:
    """Return the time to one token after a prompt of one token, or after `PROMPT` uncached."""
    start = time.perf_counter()
    if chat:
        engine.chat(model, PROMPT, max_tokens=1, cache_salt=f"salt-{next(_salts)}").raise_for_status()
    else:
        body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}
        engine.client.post("/v1/completions", json=body).raise_for_status()
    return (time.perf_counter() - start) * 1000


def _wake(engine: Engine) -> None:
    """Warm up this engine's caches, since the last requests went to the other engine."""
    for _ in range(2):
        _first_token_ms(engine, BASE_MODEL)


def _until_usable_ms(engine: Engine, model: str) -> float:
    """Return the time to first token with a new adapter, minus the smaller of two times with it resident."""
    _wake(engine)
    cold_ms = _first_token_ms(engine, model)
    return cold_ms - min(_first_token_ms(engine, model) for _ in range(2))


def _load_ms(stock: Engine, folder: Path) -> float:
    """Return the time until a PEFT folder loaded by vLLM is usable."""
    _wake(stock)
    start = time.perf_counter()
    answer = stock.client.post("/v1/load_lora_adapter", json={"lora_name": folder.name, "lora_path": str(folder)})
    answer.raise_for_status()
    return (time.perf_counter() - start) * 1000 + _until_usable_ms(stock, folder.name)


def _merge_and_load_ms(
    stock: Engine, matrix: MetaMatrix, recipe: FusionRecipe, folder: Path, subject: Subject
) -> float:
    """Return the time to merge into a PEFT folder with our own (fast) fusion and to load it in vLLM."""
    start = time.perf_counter()
    write_peft(folder, fuse(matrix, recipe, torch.bfloat16), subject.manifest.base_model.name)
    merge_ms = (time.perf_counter() - start) * 1000
    return merge_ms + _load_ms(stock, folder)


if __name__ == "__main__":
    script(main)
