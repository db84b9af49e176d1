"""`mta bank build` a second time: finished, killed, damaged, or asked for what it cannot do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bank.building.resume import WORK_FOLDER, workbench
from bank.errors import BankError
from bank.lookup.summary import summarise
from bank.manifest import MANIFEST_FILE, MATRIX_FILE, BankManifest
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
        ({"anchors": 6}, "6 anchors were asked for, but only 5 people"),
    ],
)
def test_options_that_make_no_bank_are_refused_before_anything_is_trained(
    bench: Bench, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BankError, match=message):
        bench.build("refused", **changes)
    assert not (bench.folder / "refused").exists()


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # two would wait for each other where other tests run


def run(command: list[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, check=False, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def command(bench: Bench, out: Path, *more: str) -> list[str]:
    options = {"users": bench.users, "task": "chat", "out": out, "model": bench.model, "embedder": bench.embedder}
    options |= {"anchors": 3, "rank": 4, "steps": 30, "common-steps": 5, "dtype": "float32", "history-share": 0}
    return [
        sys.executable, "-m", "server.cli", "bank", "build",
        *(text for name, value in options.items() for text in (f"--{name}", str(value))), *more,
    ]  # fmt: skip


def test_a_killed_build_goes_on_with_the_next_anchor_and_ends_with_the_same_fingerprint(bench: Bench) -> None:
    whole, killed = bench.folder / "whole", bench.folder / "killed"
    long = ("--steps", "150")  # long enough that a kill right after the first anchor falls before the last
    run(command(bench, whole, *long))
    process = subprocess.Popen(
        command(bench, killed, *long), env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + 120
    while not list(killed.glob(f"{WORK_FOLDER}/*/a00.safetensors")):
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / MANIFEST_FILE).exists()
    finished = {path.name: path.stat().st_mtime_ns for path in killed.glob(f"{WORK_FOLDER}/*/*.safetensors")}
    assert {"common.safetensors", "a00.safetensors"} <= set(finished)
    assert "a02.safetensors" not in finished
    again = run(command(bench, killed, *long))
    assert f"{len(finished)} of 4 rows are there from an earlier run" in again.stderr
    assert "training common" not in again.stderr
    fingerprints = [json.loads((folder / MANIFEST_FILE).read_text())["fingerprint"] for folder in (whole, killed)]
    assert fingerprints[0] == fingerprints[1]


def test_pieces_of_another_build_are_never_taken_over(bench: Bench) -> None:
    left = bench.folder / "left" / WORK_FOLDER / ("0" * 64)
    left.mkdir(parents=True)
    (left / "common.safetensors").write_bytes(b"of another seed")
    progress = Recorder()
    bench.build("left", progress, anchors=1)
    assert progress.begun == ["common", "a00"]


def test_without_a_terminal_the_command_says_what_is_trained_and_what_is_left(bench: Bench) -> None:
    done = run(command(bench, bench.folder / "lines"))
    last = [line for line in done.stderr.splitlines() if line.startswith("training ")][-1]
    assert last.startswith("training a02 (4 of 4)  step 30/30  loss ")
    assert last.endswith("min left")
    assert done.stdout.startswith("bank ")


def test_a_refused_build_is_one_line_and_status_1(bench: Bench) -> None:
    done = run(command(bench, bench.folder / "no", "--exclude", "/nowhere.json"), status=1)
    assert done.stderr.strip() == "error: cannot read /nowhere.json: No such file or directory"
