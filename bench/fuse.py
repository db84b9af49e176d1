"""How long until a never-seen recipe's adapter is usable in a running server: three ways, taking turns in one run.

    worker   this server: prepare, and fuse inside the worker
    merge    merge the same anchors into a PEFT folder, then have vLLM load it
    disk     have vLLM load a PEFT folder that was merged beforehand

All three are timed to the first token of a request under the new adapter, less the time to first token of the same
request once the adapter is resident: what remains is the adapter. The prompt is one token, which keeps noise low.
Method, anchors and rank are the same everywhere. The first runs on vLLM with the plugin, the others on a vLLM with the
same options without it. Time to first token, cold and warm, is that of a chat prompt of normal length, nothing cached.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from adapters.fusion import fuse
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe, Term, per_mille
from bank.manifest import BankManifest, read_manifest
from bank.matrix import open_matrix
from bank.models.folders import ensure_base_model
from bank.peft.peft_adapter import write_peft
from bench.report import Spread, report
from bench.rig.engine import KEY, Engine, running_engine, served
from server.engine.command import engine_command
from server.engine_protocol import BASE_MODEL
from server.settings import Settings
from server.supervisor.services import free_port

PROMPT = "Write two sentences about the weather of tomorrow and what to wear for it."
_salts = itertools.count()


def main(
    bank: Annotated[Path, typer.Option(help="The bank.")],
    model: Annotated[str, typer.Option(help="Base model: folder, hub id or `default`.")] = "default",
    pairs: Annotated[int, typer.Option(help="How often each way is timed, after a warm-up.", min=5)] = 15,
    dtype: Annotated[str, typer.Option(help="Data type of the served model.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the time until a never-seen recipe is usable, against merging and loading a PEFT folder."""
    manifest = read_manifest(bank)
    matrix = open_matrix(bank, manifest)
    folder = ensure_base_model(model, Settings().cache_dir)
    recipes = _fresh_recipes(manifest)
    readings: dict[str, list[float]] = {way: [] for way in ("worker", "merge", "disk", "cold", "warm")}
    torch.set_num_threads(1)  # a second thread would only wait for a core that an engine has
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_engine(bank, folder, dtype=dtype) as ours,
        _stock_vllm(bank, manifest, folder, dtype) as stock,
    ):
        for pair in track(range(pairs + 2), "Worker, merge and disk in turn"):
            taken = {
                "worker": _until_usable_ms(ours, next(recipes).name),
                "merge": _merge_and_load_ms(stock, matrix, next(recipes), Path(scratch) / f"merge-{pair}", manifest),
            }
            disk = Path(scratch) / f"disk-{pair}"
            write_peft(disk, fuse(matrix, next(recipes)), manifest.base_model.name)
            taken["disk"] = _load_ms(stock, disk)
            name = next(recipes).name
            _wake(ours)
            taken |= {"cold": _first_token_ms(ours, name, chat=True), "warm": _first_token_ms(ours, name, chat=True)}
            if pair >= 2:  # the first two warm both servers up
                for way, value in taken.items():
                    readings[way].append(value)
    ratios = {
        way: Spread.of([b / a for a, b in zip(readings["worker"], readings[way], strict=True)])
        for way in ("merge", "disk")
    }
    cold_over_warm = [c / w for c, w in zip(readings["cold"], readings["warm"], strict=True)]
    terms = f"{manifest.weights.anchors} anchors{' and the common row' if manifest.common else ''}"
    report(
        f"Until a never-seen recipe is usable, ms: {manifest.base_model.name}, {dtype}, {manifest.method.value}, "
        f"{terms}, rank {manifest.rank}, slots of rank {manifest.serving_rank}",
        [
            ("worker: prepare and fuse", Spread.of(readings["worker"])),
            ("merge to a PEFT folder, vLLM loads it", Spread.of(readings["merge"])),
            ("vLLM loads a folder merged before", Spread.of(readings["disk"])),
            ("merge over worker", ratios["merge"]),
            ("disk over worker", ratios["disk"]),
            ("time to first token, cold", Spread.of(readings["cold"])),
            ("time to first token, warm", Spread.of(readings["warm"])),
            ("cold over warm", Spread.of(cold_over_warm)),
        ],
        out,
        readings=readings,
    )


def _fresh_recipes(manifest: BankManifest) -> Iterator[FusionRecipe]:
    """Recipes of as many anchors as the bank uses, each once, in a seeded order."""
    generator, seen = random.Random(0), set()
    k, total = manifest.weights.anchors, round(1000 * manifest.weights.strength)
    while True:
        anchors = sorted(generator.sample(range(len(manifest.anchors)), k))
        weights = per_mille([generator.uniform(0.2, 1) for _ in anchors], total)
        terms = tuple(Term(a, w) for a, w in zip(anchors, weights, strict=True))
        recipe = FusionRecipe(manifest.short, manifest.method, manifest.common, terms)
        if recipe not in seen:
            seen.add(recipe)
            yield recipe


@contextmanager
def _stock_vllm(bank: Path, manifest: BankManifest, model: Path, dtype: str) -> Iterator[Engine]:
    """vLLM with our engine's options (in one process, too) and its own LoRA loading, without our plugin."""
    port = free_port()
    settings = Settings(bank=bank, engine_port=port, engine_key=KEY, max_num_seqs=16, dtype=dtype)
    argv, environment = engine_command(settings, [manifest], model)
    for option in ("--worker-extension-cls", "--scheduler-cls"):
        at = argv.index(option)
        del argv[at : at + 2]
    environment |= {"VLLM_PLUGINS": "", "MTA_BANK": "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with served(argv, environment, port) as engine:
        yield engine


def _first_token_ms(engine: Engine, model: str, *, chat: bool = False) -> float:
    """Time to one token after a prompt of one token, or after `PROMPT` with none of it cached."""
    start = time.perf_counter()
    if chat:
        engine.chat(model, PROMPT, max_tokens=1, cache_salt=f"salt-{next(_salts)}").raise_for_status()
    else:
        body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}
        engine.client.post("/v1/completions", json=body).raise_for_status()
    return (time.perf_counter() - start) * 1000


def _wake(engine: Engine) -> None:
    """Warm this engine's caches, whichever way it makes adapters: the other engine was asked last."""
    for _ in range(2):
        _first_token_ms(engine, BASE_MODEL)


def _until_usable_ms(engine: Engine, model: str) -> float:
    """Time to first token under an adapter, less the same once it is resident (the smaller of two)."""
    _wake(engine)
    cold_ms = _first_token_ms(engine, model)
    return cold_ms - min(_first_token_ms(engine, model) for _ in range(2))


def _load_ms(stock: Engine, folder: Path) -> float:
    """Time for vLLM to load a PEFT folder, until it is usable."""
    _wake(stock)
    start = time.perf_counter()
    answer = stock.client.post("/v1/load_lora_adapter", json={"lora_name": folder.name, "lora_path": str(folder)})
    answer.raise_for_status()
    return (time.perf_counter() - start) * 1000 + _until_usable_ms(stock, folder.name)


def _merge_and_load_ms(
    stock: Engine, matrix: MetaMatrix, recipe: FusionRecipe, folder: Path, manifest: BankManifest
) -> float:
    """Time to merge into a PEFT folder with our own (fast) fusion, and for vLLM to load that."""
    start = time.perf_counter()
    write_peft(folder, fuse(matrix, recipe, torch.bfloat16), manifest.base_model.name)
    merge_ms = (time.perf_counter() - start) * 1000
    return merge_ms + _load_ms(stock, folder)


if __name__ == "__main__":
    typer.run(main)
