"""Serve thousands of distinct recipes on one server while long streams hold a recipe that they would evict.

Uses a tiny random model and eight slots. Checks that every answer arrives, that the streams' tokens are right, and that
neither vLLM's processes nor the name map nor `/metrics` grow.
"""

from __future__ import annotations

import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from adapters.recipe import MAX_WEIGHT
from bank.manifest import read_manifest
from bank.models.folders import ensure_embedder
from bench import script
from bench.page.report import report
from bench.rig.engine import Engine, running_engine
from bench.rig.processes import descendants, memory_mib
from bench.rig.tiny import tiny_bank, tiny_model
from server.settings import Settings

CONTEXT, ANCHORS, SLOTS, CLIENTS = 16_384, 64, 8, 8
JUDGED = 4000  # tokens of each answer of the stream
NEAR_TIE = 0.01
"""Largest gap in log-probability to the best token that another batch's rounding can explain."""


class LongStream(threading.Thread):
    """Greedy answers as long as the context, streamed one after the other until `stop`; keeps their token ids."""

    def __init__(self, engine: Engine, recipe: str) -> None:
        super().__init__(daemon=True)
        self.engine, self.recipe = engine, recipe
        self.prompt: list[int] = []
        self.answers: list[list[int]] = []
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.is_set():
            self.answers.append([])
            self._stream(self.answers[-1])

    def _stream(self, tokens: list[int]) -> None:
        body = {
            "model": self.recipe,
            "messages": [{"role": "user", "content": "tell me everything"}],
            "max_tokens": CONTEXT - 200,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        with self.engine.client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if self._stop_asked.is_set():
                    return
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    self.prompt = self.prompt or chunk.get("prompt_token_ids") or []
                    for choice in chunk["choices"]:
                        tokens += choice.get("token_ids") or []

    def stop(self) -> None:
        """Hang up."""
        self._stop_asked.set()
        self.join(30)


def main(
    recipes: Annotated[
        int, typer.Option(help="Distinct recipes to serve.", min=100, max=(ANCHORS - 1) * MAX_WEIGHT)
    ] = 2000,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Serve thousands of recipes beside long streams, and check for growth."""
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_model(Path(scratch) / "model", context=CONTEXT)
        embedder = ensure_embedder(None, Settings().cache_dir)
        bank = tiny_bank(Path(scratch) / "bank", model, embedder, anchors=ANCHORS)
        with running_engine(bank, model, max_loras=SLOTS, max_model_len=CONTEXT, dtype="float32") as engine:
            _soak(engine, f"mta3:{read_manifest(bank).short}:shared", recipes, out)


def _soak(engine: Engine, prefix: str, recipes: int, out: Path | None) -> None:
    stream = LongStream(engine, f"{prefix}:c+a63*999")
    stream.start()
    names = [f"{prefix}:c+a{i % (ANCHORS - 1):02d}*{1 + i // (ANCHORS - 1) * 7 % MAX_WEIGHT}" for i in range(recipes)]
    answers = 0
    rss_mib: dict[int, dict[str, float]] = {}
    series: dict[int, int] = {}
    early, middle = 10, recipes // 4
    with Progress() as progress, ThreadPoolExecutor(CLIENTS) as pool:
        task = progress.add_task("Recipes served", total=recipes)
        for upto in (early, middle, recipes):
            for _ in pool.map(lambda name: engine.chat(name, max_tokens=4).raise_for_status(), names[answers:upto]):
                answers += 1
                progress.advance(task)
            rss_mib[upto] = _resident_mib(engine.pid)
            series[upto] = len(engine.client.get("/metrics").text.splitlines())
    status = engine.status()
    running = stream.is_alive()
    stream.stop()
    growth = {process: 100 * (rss_mib[recipes][process] / rss_mib[middle][process] - 1) for process in rss_mib[recipes]}
    report(
        f"{recipes} recipes through {SLOTS} slots, {CLIENTS} clients, tiny model in float32",
        [
            ("answers", f"{answers} of {recipes}"),
            ("stream still running at the end", running),
            ("tokens streamed", sum(map(len, stream.answers))),
            ("of them not this recipe's own choice", sum(_foreign_tokens(engine, stream, it) for it in stream.answers)),
            *((f"growth of {name} from recipe {middle}, %", round(by, 2)) for name, by in growth.items()),
            ("names known (at most 1024)", status["names"]),
            ("adapters in the worker (at most 64)", len(engine.resident()["resident"])),
            (f"/metrics, lines after {early} and {recipes}", f"{series[early]} and {series[recipes]}"),
        ],
        out,
        rss_mib=rss_mib,
        series=series,
    )


def _foreign_tokens(engine: Engine, stream: LongStream, answer: list[int]) -> int:
    """Count an answer's tokens that another adapter must have chosen: worse than the best by more than a tie."""
    tokens = stream.prompt + answer[:JUDGED]
    body = {"model": stream.recipe, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    response = engine.client.post("/v1/completions", json=body).raise_for_status()
    entries = response.json()["choices"][0]["prompt_logprobs"][len(stream.prompt) :]
    foreign = 0
    for token, entry in zip(tokens[len(stream.prompt) :], entries, strict=True):
        best = max(choice["logprob"] for choice in entry.values())
        foreign += entry[str(token)]["logprob"] < best - NEAR_TIE
    return foreign


def _resident_mib(pid: int) -> dict[str, float]:
    """Return the resident set of the engine's processes in MiB, by name."""
    sizes = {}
    for process in [pid, *descendants(pid)]:
        if (mib := memory_mib(process)) > 100:  # ignore helper processes such as resource trackers
            sizes[f"{Path(f'/proc/{process}/comm').read_text('utf-8').strip()} ({process})"] = mib
    return sizes


if __name__ == "__main__":
    script(main)
