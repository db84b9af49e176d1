"""`mta bank build` on a tiny model: real training, real kills, real files."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.fusion import fuse
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe, Method, Term
from adapters.trainer import StepReport
from bank.build import build_bank
from bank.embedder import Embedder
from bank.errors import BankError
from bank.manifest import MANIFEST_FILE, MATRIX_FILE, BankManifest
from bank.options import BuildInputs, BuildOptions
from bank.resume import WORK_FOLDER, workbench
from bank.serving import ServingBank
from bank.summary import summarise
from tests.support.people import people, write_people

OPTIONS = BuildOptions(
    task="chat",
    anchors=3,
    rank=4,
    user_rank=4,
    steps=3,
    common_steps=3,
    batch_size=4,
    common_batch_size=4,
    learning_rate=1e-2,
    common_learning_rate=1e-2,
    dtype="float32",
)


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.begun: list[str] = []
        self.steps: list[tuple[str, int]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, work_tokens: Mapping[str, int]) -> None:
        self.begun += work_tokens
        assert all(tokens > 0 for tokens in work_tokens.values())

    def step(self, row: str, steps: int, report: StepReport) -> None:
        self.steps.append((row, report.step))


class Bench:
    """Builds banks of the same people into folders of their own."""

    def __init__(self, folder: Path, model: Path, embedder: Path) -> None:
        self.folder, self.model, self.embedder = folder, model, embedder
        self.users = write_people(folder / "users.json", people(5))

    def build(self, name: str, progress: Recorder | None = None, *, inputs: Any = None, **changes: Any) -> BankManifest:
        where = BuildInputs(
            users=self.users,
            out=self.folder / name,
            model=str(self.model),
            embedder=self.embedder,
            cache_dir=self.folder,
        )
        options = dataclasses.replace(OPTIONS, **changes)
        return build_bank(dataclasses.replace(where, **(inputs or {})), options, progress or Recorder())

    def matrix(self, name: str, manifest: BankManifest) -> MetaMatrix:
        path = self.folder / name / MATRIX_FILE
        return MetaMatrix.open(path, manifest.layout, len(manifest.anchors), manifest.common)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("build"), tiny_model_folder, embedder_folder)


@pytest.fixture(scope="module")
def built(bench: Bench) -> BankManifest:
    """The bank of `OPTIONS`, in the folder `plain`."""
    return bench.build("plain")


def test_a_bank_has_exactly_the_anchors_asked_for_with_the_longest_histories(built: BankManifest) -> None:
    assert [entry.id for entry in built.anchors] == ["a00", "a01", "a02"]
    assert built.anchors[-1].items == 18


def test_the_same_seed_gives_the_same_bank_and_another_seed_another(bench: Bench, built: BankManifest) -> None:
    assert bench.build("again").fingerprint == built.fingerprint
    assert bench.build("other-seed", seed=1).fingerprint != built.fingerprint


def test_every_option_is_in_the_manifest(built: BankManifest) -> None:
    recorded = {name: str(value) for name, value in built.training.items()}
    for name, value in dataclasses.asdict(OPTIONS).items():
        assert recorded[name] == str(value)
    assert built.training["people"] == 5


def test_no_name_and_no_text_of_anybody_is_in_the_artifact(bench: Bench, built: BankManifest) -> None:
    for path in (bench.folder / "plain").rglob("*"):
        content = path.read_bytes()
        assert b"secret-person" not in content
        assert b"surfing" not in content


def test_the_common_row_is_trained_first_and_the_work_folder_is_gone_after(bench: Bench) -> None:
    progress = Recorder()
    bench.build("order", progress, seed=2)
    assert progress.begun == ["common", "a00", "a01", "a02"]
    assert progress.steps == [(row, step) for row in progress.begun for step in (1, 2, 3)]
    assert not (bench.folder / "order" / WORK_FOLDER).exists()


def test_a_shared_bank_has_one_a_and_rows_that_are_b_alone(bench: Bench, built: BankManifest) -> None:
    matrix = bench.matrix("plain", built)
    assert matrix.shared_a is not None
    assert matrix.rows.shape == (4, built.layout.b_numbers)
    assert all(matrix.rows[i].abs().sum() > 0 for i in range(4))
    anchor = fuse(matrix, FusionRecipe(built.short, Method.SHARED, False, (Term(0, 1000),)))
    both = fuse(matrix, FusionRecipe(built.short, Method.SHARED, True, (Term(0, 1000),)))
    for name in anchor.a:
        assert torch.equal(anchor.a[name], both.a[name])


@pytest.mark.parametrize("method", [Method.SHARED, Method.CAT])
def test_an_anchor_explains_its_person_better_than_the_common_row_alone(
    bench: Bench, method: Method, tiny_model_folder: Path
) -> None:
    """The dense sum of base, common row and anchor, as a recipe of that anchor is served."""
    from bank.histories import read_histories
    from bank.prompt import encode_pair
    from bank.tasks import get_task
    from bank.training import load_base

    manifest = bench.build(f"better-{method}", anchors=5, method=method, steps=40)
    matrix = bench.matrix(f"better-{method}", manifest)
    model, tokenizer = load_base(tiny_model_folder, "float32")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss(terms: tuple[Term, ...], index: int) -> float:
        lora = fuse(matrix, FusionRecipe(manifest.short, method, True, terms), torch.float32)
        total = 0.0
        with torch.no_grad():
            for name in lora.a:
                model.get_submodule(name).weight += lora.delta(name)
            for turn, output in histories[index].pairs(get_task("chat")):
                pair = encode_pair(tokenizer, turn, output, 200)
                logits = model(input_ids=torch.tensor([pair.ids])).logits[0, :-1].log_softmax(-1)
                gold = torch.tensor(pair.ids[1:])[:, None]
                total -= float(logits.gather(1, gold)[pair.loss_from - 1 :].sum())
            model.load_state_dict(base)
        return total

    histories = read_histories(bench.users, get_task("chat"))
    for index in range(5):
        assert loss((Term(index, 1000),), index) < 0.9 * loss((), index)


@pytest.mark.parametrize(("method", "serving"), [(Method.CAT, 16), (Method.LINEAR, 16)])
def test_banks_of_other_methods_keep_an_a_for_every_anchor(bench: Bench, method: Method, serving: int) -> None:
    manifest = bench.build(method.value, method=method)
    assert manifest.serving_rank == serving
    assert bench.matrix(method.value, manifest).rows.shape == (4, manifest.layout.a_numbers + manifest.layout.b_numbers)


@pytest.mark.parametrize("method", list(Method))
def test_a_bank_without_a_common_row_says_so_and_has_none(bench: Bench, method: Method) -> None:
    progress = Recorder()
    manifest = bench.build(f"lone-{method}", progress, method=method, common=False)
    assert progress.begun == ["a00", "a01", "a02"]
    assert not manifest.common
    assert len(bench.matrix(f"lone-{method}", manifest).rows) == 3


def test_people_left_out_shape_nothing(bench: Bench, tmp_path: Path) -> None:
    """Leaving two out is the same bank as a file without them."""
    exclude = write_people(tmp_path / "exclude.json", ["secret-person-1", "secret-person-4"])
    without = write_people(tmp_path / "without.json", [p for i, p in enumerate(people(5)) if i not in (1, 4)])
    excluded = bench.build("excluded", inputs={"exclude": exclude})
    assert excluded.fingerprint == bench.build("without", inputs={"users": without}).fingerprint
    assert [entry.items for entry in excluded.anchors] == [14, 16, 17]


def test_too_few_candidates_is_an_error_with_both_numbers(bench: Bench, tmp_path: Path) -> None:
    short = write_people(
        tmp_path / "short.json",
        [*people(2), {**people(1, items=10)[0], "user_id": "of ten items"}],
    )
    with pytest.raises(BankError, match="3 anchors were asked for and 2 people"):
        bench.build("few", inputs={"users": short})
    assert not (bench.folder / "few").exists()


def test_only_the_target_modules_are_adapted(bench: Bench) -> None:
    manifest = bench.build("targets", target_modules=("q_proj", "v_proj"))
    assert manifest.target_modules == ("q_proj", "v_proj")
    assert len(manifest.modules) == 4
    with pytest.raises(BankError, match=r"--target-modules: .*query"):
        bench.build("no-targets", target_modules=("query",))


def test_epochs_count_passes_over_each_ones_own_data(bench: Bench) -> None:
    progress = Recorder()
    bench.build("epochs", progress, epochs=1.0, anchors=2)
    assert [sum(row == name for row, _ in progress.steps) for name in ("common", "a00", "a01")] == [20, 5, 5]


def test_a_user_is_led_to_the_anchor_who_talks_of_the_same(
    bench: Bench, built: BankManifest, embedder_folder: Path
) -> None:
    embedder = Embedder.load(embedder_folder)
    bank = ServingBank.open(bench.folder / "plain", embedder.id)
    profile = embedder.embed(["Say 99 on baking bread"])[0]
    recipe, weights = bank.personalise(profile)
    assert weights[0].similarity == max(w.similarity for w in weights) > 0.5
    assert recipe.common
    assert sum(term.weight for term in recipe.terms) == 1000
    assert np.isclose(sum(w.weight for w in weights), 1)


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
        ({"common": False, "strength": 0.5}, "drop --strength or --no-common"),
        ({"rank": 512}, "above vLLM's largest"),
        ({"method": Method.CAT, "k": 200, "anchors": 200}, "above vLLM's largest"),
        ({"anchors": 0}, "--anchors must be at least 1"),
        ({"steps": -1}, "--steps must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be between"),
        ({"strength": 1.5}, "--strength must be above 0"),
        ({"epochs": 0.0}, "--epochs must be above 0"),
        ({"seed": -1}, "cannot be negative"),
    ],
)
def test_options_that_make_no_bank_are_refused_before_anything_is_trained(
    bench: Bench, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BankError, match=message):
        bench.build("refused", **changes)
    assert not (bench.folder / "refused").exists()


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Two threads gain a tiny model nothing, and wait for each other where other tests run beside them."""


def command(bench: Bench, out: Path, *more: str) -> list[str]:
    options = {"users": bench.users, "task": "chat", "out": out, "model": bench.model, "embedder": bench.embedder}
    options |= {"anchors": 3, "rank": 4, "steps": 30, "common-steps": 5, "dtype": "float32"}
    return [
        sys.executable, "-m", "server.cli", "bank", "build",
        *(text for name, value in options.items() for text in (f"--{name}", str(value))), *more,
    ]  # fmt: skip


def test_a_killed_build_goes_on_with_the_next_anchor_and_ends_with_the_same_fingerprint(bench: Bench) -> None:
    whole, killed = bench.folder / "whole", bench.folder / "killed"
    long = ("--steps", "150")  # long enough that a kill right after the first anchor falls before the last
    subprocess.run(command(bench, whole, *long), check=True, env=ONE_THREAD, capture_output=True)
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
    again = subprocess.run(command(bench, killed, *long), check=True, env=ONE_THREAD, capture_output=True, text=True)
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
    done = subprocess.run(
        command(bench, bench.folder / "lines"), check=True, env=ONE_THREAD, capture_output=True, text=True
    )
    last = [line for line in done.stderr.splitlines() if line.startswith("training ")][-1]
    assert last.startswith("training a02 (4 of 4)  step 30/30  loss ")
    assert last.endswith("min left")
    assert done.stdout.startswith("bank ")


def test_a_refused_build_is_one_line_and_status_1(bench: Bench) -> None:
    done = subprocess.run(
        command(bench, bench.folder / "no", "--exclude", "/nowhere.json"), check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "error: cannot read /nowhere.json: No such file or directory"
