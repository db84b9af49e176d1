"""Measure all of it on one GPU: `python -m bench.gpu`, docs/gpu.md.

Each step is a command of its own, of minutes, printed first: our kernels and training on the card, recipes beside PEFT
folders on stock vLLM, a bank of 64 anchors, whether serving equals training, and the benchmarks with that bank. The
results are a table, `bench-gpu.json` with the card and the steps, and a file for each benchmark beside it, from which
`mta bench report` fills docs/gpu.md. After an interruption, `--resume` runs what has not passed. Exit status 1 if a
step fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench import script
from bench.page.report import console
from bench.rig.people import people, write_people
from bench.rig.steps import OnlyOption, ResumeOption, Run
from server.settings import load_settings

ANCHORS = 64
PEOPLE = 80  # made up, if no others are given
STREAMS = 32  # vLLM's slots by default
SERVING = {  # by the name of the report, after `gpu-`
    "cost": ("bench.serving.cost", "--slots", STREAMS, "--without-lora"),
    "cold": ("bench.serving.cold",),
    "stall": ("bench.serving.stall", "--slots", STREAMS, "--streams", 4, "--per-s", 20, "--arrivals", 100),
    "thrash": ("bench.serving.thrash", "--slots", STREAMS, "--users", 1000, "--requests", 1000),
    "shared": ("bench.serving.shared",),
    "adapt": ("bench.adapt.wait",),
}


def main(
    *,
    model: Annotated[str | None, typer.Option(help="Base model: folder, hub id or `default`.")] = None,
    users: Annotated[
        Path | None, typer.Option(help="People to build the bank of, in LaMP's per-user layout.", dir_okay=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the bank and the reports.")] = Path("out/gpu"),
    resume: ResumeOption = False,
    only: OnlyOption = "",
) -> None:
    """Run everything, and print one table at the end."""
    run = Run(out / "bench-gpu.json", resume=resume, only=only)
    bank, base = out / "bank", load_settings(model=model).model
    histories = users or write_people(out / "people.json", people(PEOPLE))
    run.step("kernels and training", ("-m", "pytest", "-q", "tests/gpu_kernels"))
    run.step("recipes beside PEFT folders", ("-m", "bench.serving.recipes", "--out", out / "gpu-recipes.json"))
    build = ("--users", histories, "--task", "chat", "--anchors", ANCHORS, "--model", base, "--out", bank)
    if run.step(f"a bank of {ANCHORS} anchors", ("-m", "server.cli", "bank", "build", *build)):
        served = ("--bank", str(bank), "--model", base)
        verify = ("-m", "server.cli", "verify", *served, "--engine-url")
        run.served("serving equals training", (out / "data", served), lambda _, engine: (*verify, engine), ())
        for name, (module, *options) in SERVING.items():
            run.step(name, ("-m", module, *served, *options, "--out", out / f"gpu-{name}.json"))
    console().print(f"into docs/gpu.md: mta bench report --results {out} --page docs/gpu.md", soft_wrap=True)
    run.end("On a GPU")


if __name__ == "__main__":
    script(main)
