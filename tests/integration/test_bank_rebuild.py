"""`mta bank build` a second time: finished, killed, damaged, or asked for what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.training.trainer import StepReport
from bank.building.resume import WORK_FOLDER, workbench
from bank.errors import BankError
from bank.lookup.summary import summarise
from bank.manifest import MANIFEST_FILE, MATRIX_FILE, BankManifest
from server.cli import app
from tests.support.bank_bench import Bench, Recorder


def test_building_the_same_bank_again_does_nothing(bench: Bench, built: BankManifest) -> None:
    progress = Recorder()
    assert bench.build("plain", progress) == built
    assert not progress.begun
    assert "already" in progress.said[-1]


def test_another_bank_is_replaced_only_by_force(bench: Bench) -> None:
    old = bench.build("forced", anchors=2)
    with pytest.raises(BankError, match=f"another bank, {old.short}.*--force"):
        bench.build("forced", anchors=1)
    new = bench.build("forced", anchors=1, inputs={"force": True})
    assert summarise(bench.folder / "forced")["fingerprint"] == new.fingerprint != old.fingerprint


def test_a_bank_with_a_flipped_byte_is_refused_and_can_be_built_again(bench: Bench) -> None:
    manifest = bench.build("flipped", anchors=1)
    path = bench.folder / "flipped" / MATRIX_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BankError, match=f"{MATRIX_FILE} is damaged"):
        summarise(bench.folder / "flipped")
    with pytest.raises(BankError, match=r"cannot be used .*--force"):
        bench.build("flipped", anchors=1)
    assert bench.build("flipped", anchors=1, inputs={"force": True}) == manifest
    summarise(bench.folder / "flipped")


def test_two_builds_in_one_folder_are_refused(bench: Bench) -> None:
    with workbench(bench.folder / "busy", "key"), pytest.raises(BankError, match="another build is running"):
        bench.build("busy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "poems"}, "unknown task 'poems'"),
        ({"rank": 512}, "above vLLM's largest"),
    ],
)
def test_options_that_make_no_bank_are_refused_before_anything_is_trained(
    bench: Bench, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BankError, match=message):
        bench.build("refused", **changes)
    assert not (bench.folder / "refused").exists()


class Killer(Recorder):
    """Ends a build at the second anchor's first step."""

    def step(self, row: str, steps: int, report: StepReport) -> None:
        super().step(row, steps, report)
        if row == "a01":
            raise KeyboardInterrupt


def test_a_killed_build_goes_on_with_the_next_anchor_and_ends_with_the_same_fingerprint(
    bench: Bench, built: BankManifest
) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.build("killed", Killer())
    assert not (bench.folder / "killed" / MANIFEST_FILE).exists()
    finished = {path.name for path in (bench.folder / "killed").glob(f"{WORK_FOLDER}/*/*.npy")}
    assert finished == {"embeddings.npy", "anchors.npy", "common.npy", "a00.npy"}
    progress = Recorder()
    assert bench.build("killed", progress).fingerprint == built.fingerprint
    assert "2 of 4 rows were finished in an earlier run" in progress.said
    assert progress.begun == ["a01", "a02"]


def test_pieces_of_another_build_are_never_taken_over(bench: Bench) -> None:
    left = bench.folder / "left" / WORK_FOLDER / ("0" * 64)
    left.mkdir(parents=True)
    (left / "common.npy").write_bytes(b"of another seed")
    progress = Recorder()
    bench.build("left", progress, anchors=1)
    assert progress.begun == ["common", "a00"]


def command(bench: Bench, name: str, *more: str) -> list[str]:
    options = {"users": bench.users, "task": "chat", "out": bench.folder / name, "model": bench.model}
    options |= {"embedder": bench.embedder, "anchors": 3, "rank": 4, "steps": 8, "common-steps": 5, "dtype": "float32"}
    return [
        "bank",
        "build",
        *(text for option, value in options.items() for text in (f"--{option}", str(value))),
        *more,
    ]


def test_without_a_terminal_the_command_says_what_is_trained_and_what_is_left(bench: Bench) -> None:
    done = CliRunner().invoke(app, command(bench, "lines"))
    last = [line for line in done.stderr.splitlines() if line.startswith("training ")][-1]
    assert last.startswith("training a02 (4 of 4)  step 8/8  loss ")
    assert last.endswith("min left")
    assert done.stdout.startswith("bank ")


def test_a_refused_build_is_one_line_and_status_1(bench: Bench) -> None:
    refused = [sys.executable, "-m", "server.cli", *command(bench, "no", "--exclude", "/nowhere.json")]
    done = subprocess.run(refused, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: cannot read /nowhere.json: No such file or directory"
