"""Run the checks that take long or need real histories: `make acceptance DATA=../shared/data`.

Runs the model test of the store with many more steps than `make test`, tries every base model, builds a bank of 12
anchors from the headline writers of `DATA` (kept, and resumed if it was interrupted), and runs the other benchmarks
with it one by one, printing each command first. The results are a table and `acceptance.json`, which holds the steps
done so far: after an interruption, `--resume` runs the others. Exit status 1 if a step fails or a target is missed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from bench import script
from bench.rig.steps import OWN_VERDICT, OnlyOption, ResumeOption, Run, Target
from bench.rig.subject import tiny
from server.settings import load_settings

TASK = "news_headline"
RESULT = "acceptance.json"
ANCHORS = 12


def _counts(value: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", value))


def _share(value: str) -> float:
    part, whole = _counts(value)
    return part / whole


FUSE = (Target("merge over worker", "at least 5", lambda value: value["median"] >= 5),)
SOAK = (
    Target("answers", "all", lambda value: len(set(_counts(value))) == 1),
    Target("stream still running", "yes", bool),
    Target("of them not this recipe's own", "0", lambda value: value == 0),
    Target("growth of", "at most 3 %", lambda value: value <= 3),
    Target("names known", "at most 1024", lambda value: value <= 1024),
    Target("/metrics, lines", "no growth", lambda value: _counts(value)[-1] <= _counts(value)[-2]),
)
PACKAGES = (
    Target("components in the SBOM of gateway", "all", lambda value: value > 0),
    Target("known vulnerabilities", "none", lambda value: value in ("none", "none in those", "not checked")),
    Target("packages looked up", "all", lambda value: len(set(_counts(value))) == 1, binding=False),
)
PERSONAL = Target("answers unlike the base model's", "more than 80 %", lambda value: _share(value) > 0.8)
SERVED = (Target("answers not served", "0", lambda value: value == 0),)
NO_IMAGES = "make images (with STAND_INS=1 where no registry of images can be reached)"
CHAT_APP = "python -m venv APP && APP/bin/pip install open-webui, then set CHAT_APP_PYTHON=APP/bin/python"
GATEWAY = (Target("whole, 1 concurrent: added at p50", "3 ms", lambda value: value["median"] <= 3, binding=False),)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the real histories.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder for the bank and the reports.")] = Path("out/acceptance"),
    app_python: Annotated[
        Path | None, typer.Option(help="Python with the package `open-webui`.", envvar="CHAT_APP_PYTHON")
    ] = None,
    resume: ResumeOption = False,
    only: OnlyOption = "",
) -> None:
    """Run everything, and print one table at the end."""
    run = Run(out / RESULT, resume=resume, only=only)
    bank, users = out / f"{TASK}-{ANCHORS}", data / TASK / "users.json"
    model = ("tests/contract/test_store_model.py", "--hypothesis-profile=long")
    run.step("the store's promises, 50,000 steps", ("-m", "pytest", "-q", *model))
    run.step("base models", ("-m", "pytest", "-q", "-m", "", "tests/integration/test_architectures.py"))
    run.step("benchmarks", ("-m", "pytest", "-q", "-m", "acceptance", "tests/integration/test_bench.py"))
    run.step("a store that is lost", ("-m", "pytest", "-q", "-m", "", "tests/integration/test_backup.py"))
    run.step("what the version before wrote", ("-m", "pytest", "-q", "-m", "", "tests/integration/test_earlier.py"))
    run.step("packages", ("-m", "deploy.audit"), PACKAGES)
    run.step("the wheel", ("-m", "deploy.wheel"), (OWN_VERDICT,))
    build = ("--users", data / TASK / "anchors.json", "--task", TASK, "--anchors", ANCHORS, "--out", bank)
    served = ("--bank", str(bank), "--model", load_settings().model)
    people = ("--users", users, *served)
    if run.step("a bank of real people", ("-m", "server.cli", "bank", "build", *build, "--baselines")):
        run.step("fuse", ("-m", "bench.serving.cold", "--bank", bank), FUSE)
        run.step("soak", ("-m", "bench.scale.soak"), SOAK)
        _fleets(run, bank)
        measured = ("-m", "bench.serving.gateway", "--max-tokens", 32)
        run.served(
            "gateway",
            (out / "tiny-data", _tiny(out / "tiny")),
            lambda url, engine: (*measured, "--gateway", url, "--engine", engine),
            GATEWAY,
        )
        run.step("overload", ("-m", "bench.fleet.overload"), (OWN_VERDICT,))
        run.step("feedback beside answers", ("-m", "bench.serving.feedback"), SERVED)
        learn = ("-m", "evaluation.studies.learning", "--users", users, "--bank", bank, "--out", out / "learning")
        run.step("predict, then learn", (*learn, "--people", 4, "--texts", 9, "--refresh", 6))
        if app_python:
            chat = ("-m", "deploy.console.chat_app", "--bank", bank, "--app-python", app_python)
            run.step("a chat app in a browser", (*chat, "--out", out / "chats"))
        else:
            run.skip("a chat app in a browser", CHAT_APP)
        # In bfloat16 an answer depends on its batch where two tokens nearly tie, so use float32.
        run.served(
            "serving equals training",
            (out / "data", (*served, "--dtype", "float32")),
            lambda _, engine: ("-m", "server.cli", "verify", *served, "--engine-url", engine),
            (),
        )
        run.served(
            "beside a job",
            (out / "adapt-data", served),
            lambda url, _: ("-m", "bench.adapt.beside", "--gateway", url),
            (OWN_VERDICT,),
        )
        run.step("two engines as one", ("-m", "bench.fleet.replicas", *people), (OWN_VERDICT, PERSONAL))
        run.step("quality", ("-m", "server.cli", "eval", *people, "--out", out / "quality", "--no-predict"))
    run.end("Acceptance")


def _tiny(folder: Path) -> tuple[str, ...]:
    """Create a tiny model and its bank, and return them as options; the gateway's cost does not depend on the model."""
    subject = tiny(folder)
    return "--bank", str(subject.bank), "--model", str(subject.model)


def _fleets(run: Run, bank: Path) -> None:
    """Kill and exchange the parts of fleets, as processes and as containers, and simulate larger ones."""
    run.step("chaos", ("-m", "bench.fleet.chaos"), (OWN_VERDICT,))
    run.step("all exchanged under load", ("-m", "bench.fleet.rolling"), (OWN_VERDICT,))
    lasting = ("--minutes", 30, "--death-s", 90, "--backup-minutes", 10)
    run.step("half an hour of everything", ("-m", "bench.fleet.lasting", *lasting), (OWN_VERDICT,))
    run.step("a simulated fleet", ("-m", "bench.fleet.simulate", "--check"))
    _containers(run, bank)


def _containers(run: Run, bank: Path) -> None:
    """Run the compose files where Docker or Podman has our images."""
    for tool in filter(shutil.which, ("docker", "podman")):
        listed = subprocess.run(
            [tool, "images", "--format", "{{.Repository}}"], capture_output=True, text=True, check=False
        )
        if {"mta-gateway", "mta-engine-cpu"} <= {name.rpartition("/")[2] for name in listed.stdout.split()}:
            run.step("containers", ("-m", "deploy.containers", "test", "--bank", bank), (OWN_VERDICT,))
            return
    run.skip("containers", NO_IMAGES)


if __name__ == "__main__":
    script(main)
