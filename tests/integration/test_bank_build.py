"""`mta bank build` on a tiny model: real training, with the past in prompts too, real kills, real files, a verdict."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adapters.flat import flattened
from adapters.fusion import fuse
from adapters.recipe import FORMAT, FusionRecipe, Term, parse_recipe
from adapters.training.adapt_config import AdaptConfig
from adapters.training.attached import attached
from adapters.training.example import Acts, Example
from adapters.training.loss import mean_loss
from adapters.training.trainer import StepReport
from adapters.training.user_trainer import train_user
from bank.building.assemble import BASELINES
from bank.building.build import build_bank, build_baselines, read_inputs
from bank.building.options import BuildOptions
from bank.building.progress import RowProgress
from bank.building.ranks import Ranks, joined
from bank.building.resume import WORK_FOLDER, Inputs, workbench
from bank.building.rows import RowJob, RowTrainer
from bank.errors import BankError
from bank.items.histories import History, Query, read_histories
from bank.items.prompt import encode_pair
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.lookup.signature import Signature
from bank.lookup.summary import summarise
from bank.manifest import BASE, COORDINATES_FILE, MANIFEST_FILE, MATRIX_FILE, ROWS_FILE, BankManifest, read_manifest
from bank.matrix import open_anchor_rows, shared_part
from bank.models.load import load_base
from bench.rig.people import people, write_people
from evaluation.methods import METHODS, Evaluator
from evaluation.scoring import OpenBank, Scorer
from evaluation.verdict import judge_bank
from server.cli import app
from tests.support.bank_bench import OPTIONS, Bench, Recorder, flip_a_bit
from tests.support.dense import dense_adapter, token_logprobs

CHAT = get_task("chat")


def test_bank_has_the_requested_anchors_and_names_no_person(bench: Bench, built: BankManifest) -> None:
    assert [entry.id for entry in built.anchors] == ["a00", "a01", "a02"]
    assert built.anchors[-1].items == 18
    assert not any(anchor.words for anchor in built.anchors)
    assert built.training.items() >= (asdict(OPTIONS) | {"people": 5}).items()
    content = b"".join(path.read_bytes() for path in (bench.folder / "plain").rglob("*"))
    assert not any(word in content for word in (b"secret-person", b"surfing"))
    matrix = bench.matrix("plain", built)  # rows are B alone
    assert matrix.rows.shape == (4, built.layout.b_numbers)
    assert all(matrix.rows[i].abs().sum() > 0 for i in range(4))
    embedder = Embedder.load(bench.embedder)  # a user is led to the anchor who talks of the same
    bank = ServingBank.open(bench.folder / "plain", embedder.id)
    found = bank.personalise(embedder.embed(["Say 99 on baking bread"])[0])
    assert found.weights[0].similarity == max(weight.similarity for weight in found.weights) > 0.5
    assert found.recipe.common
    assert sum(term.weight for term in found.recipe.terms) == 500


def test_the_common_row_is_trained_first_and_without_old_pieces(bench: Bench, built: BankManifest) -> None:
    left = bench.folder / "order" / WORK_FOLDER / ("0" * 64)
    left.mkdir(parents=True)
    (left / "common.npy").write_bytes(b"of an earlier version")
    with pytest.raises(BankError, match="holds the unfinished build of another bank"):
        bench.build("order", seed=2)
    progress = Recorder()
    assert bench.build("order", progress, seed=2, inputs={"force": True}).fingerprint != built.fingerprint
    assert progress.begun == ["common", "a00", "a01", "a02"]
    assert progress.steps == [(row, step) for row in progress.begun for step in (1, 2, 3)]
    measured = ("measuring the curvature", "fitting the rule", "fitting the trust in phrases")
    assert progress.pieces == [(what, person, 5) for what in measured for person in range(6)]
    assert not (bench.folder / "order" / WORK_FOLDER).exists()


def test_anchor_lowers_its_persons_loss_below_common_row(bench: Bench, tiny_model_folder: Path) -> None:
    users = write_people(bench.folder / "three.json", people(3))
    manifest = bench.build("better", inputs={"users": users}, steps=40)
    matrix, (model, tokenizer) = bench.matrix("better", manifest), load_base(tiny_model_folder, "float32")

    def loss(history: History, *terms: Term) -> float:
        lora = fuse(matrix, FusionRecipe(manifest.short, manifest.method, True, terms), torch.float32)
        with attached(model, lora) as here:
            return mean_loss(here.model, [encode_pair(tokenizer, *pair, 200) for pair in history.pairs(CHAT)])

    for index, history in enumerate(read_histories(users, CHAT)):
        assert loss(history, Term(index, 1000)) < 0.9 * loss(history)


def test_a_dry_run_says_what_a_build_would_take(tiny_model_folder: Path, tmp_path: Path) -> None:
    for name, count in (("rosa", 12), ("tom", 2)):
        (tmp_path / name).mkdir()
        lines = [f'{{"input": "Say {number}", "output": "I say {number}"}}\n' for number in range(count)]
        (tmp_path / name / "items.jsonl").write_text("".join(lines))
    (tmp_path / "tom" / "note.txt").write_text("A note of a few words")
    (tmp_path / "tom" / "photo.png").write_bytes(b"")
    given = ["bank", "check", str(tmp_path), "--model", str(tiny_model_folder)]
    found = CliRunner().invoke(app, [*given, "--anchors", "1"])
    words = " ".join(found.output.split())
    assert found.exit_code == 0, found.output
    assert "2: 1 can be anchors (11 lessons or more), 1 teach the common row alone" in words
    assert "15: 14 lessons, 1 tell topics alone" in words
    assert "1: tom/photo.png is no .txt" in words and "min with 1 anchors" in words
    refused = CliRunner().invoke(app, [*given, "--anchors", "2"])
    assert refused.exit_code == 1 and "2 anchors were asked for" in " ".join(refused.output.split())


def test_the_canary_is_what_dense_formulas_read(bench: Bench, built: BankManifest) -> None:
    (model, _), canary = load_base(bench.model, "float32"), built.canary
    assert canary
    assert (len(canary.ids), canary.shared) == (24, 0)
    assert list(canary.read) == ["base", "c", "c+a00*900+a02*-700"]
    for terms, read in canary.read.items():
        recipe = parse_recipe(f"{FORMAT}:{built.short}:shared:{terms}") if terms != BASE else None
        with dense_adapter(model, bench.matrix("plain", built), recipe) if recipe else nullcontext():
            wanted = token_logprobs(model, list(canary.ids))[canary.read_from - 1 :]
        assert read == pytest.approx(wanted.tolist(), abs=2e-3)


def test_people_left_out_shape_nothing(bench: Bench, tmp_path: Path) -> None:
    exclude = write_people(tmp_path / "exclude.json", ["secret-person-1", "secret-person-4"])
    without = write_people(tmp_path / "without.json", [p for i, p in enumerate(people(5)) if i not in (1, 4)])
    ways = (bench.inputs("out", users=without), bench.inputs("out", exclude=exclude))
    said: list[str] = []
    kept, excluded = (read_inputs(where, CHAT, OPTIONS, said.append) for where in ways)
    assert said == [f"2 people are excluded by {exclude}"]
    assert kept == excluded and len(kept[0]) == 3


def test_only_the_target_modules_are_adapted(bench: Bench) -> None:
    manifest = bench.build("targets", target_modules=("q_proj", "v_proj"))
    assert (manifest.target_modules, len(manifest.modules)) == (("q_proj", "v_proj"), 4)
    assert read_manifest(bench.folder / "targets") == manifest
    with pytest.raises(BankError, match=r"--target-modules: .*query"):
        bench.build("no-targets", target_modules=("query",))


def test_what_a_model_reads_in_a_state_is_not_shared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.LlamaForCausalLM._is_stateful", True)
    with pytest.raises(BankError, match="--acts answer: this base model keeps no keys"):
        bench.build("stateful", acts=Acts.ANSWER)


def test_invalid_options_are_refused_before_training(bench: Bench, tmp_path: Path) -> None:
    of_ten = {**people(1, items=10)[0], "user_id": "of ten items"}
    short = write_people(tmp_path / "short.json", [*people(2), of_ten])
    few: dict[str, Any] = {"inputs": {"users": short}}
    for changes, message in (
        (few, "3 anchors were asked for, but only 2 people"),
        ({"task": "poems"}, "unknown task 'poems'"),
        ({"rank": 512}, "above vLLM's largest"),
        ({"seed": 2**32}, "--seed: .* less than 4294967296"),
        ({"directions": 4}, "--directions: at most --anchors 3, got 4"),
        ({"directions": 0, "anchors": 335}, "--directions 0: a recipe names at most 334 anchors"),
    ):
        with pytest.raises(BankError, match=message):
            bench.build("refused", **changes)
    assert not (bench.folder / "refused").exists()
    busy: Inputs = {"dtype": "float32", "inputs": "hash"}
    with workbench(bench.folder / "busy", busy, Ranks()), pytest.raises(BankError, match="another build is running"):
        bench.build("busy")


def test_same_bank_is_built_once_and_another_needs_force(bench: Bench) -> None:
    folder, progress = bench.folder / "forced", Recorder()
    old = bench.build("forced", anchors=2)
    assert bench.build("forced", progress, anchors=2) == old
    assert not progress.begun
    assert "already" in progress.said[-1]
    with pytest.raises(BankError, match=rf"another bank, {old.short} \(--anchors was 2, is 1\).*--force"):
        bench.build("forced", anchors=1)
    flip_a_bit(folder / MATRIX_FILE)
    with pytest.raises(BankError, match=f"{MATRIX_FILE} is damaged"):
        summarise(folder)
    with pytest.raises(BankError, match=r"cannot be used .*--force"):
        bench.build("forced", anchors=2)
    new = bench.build("forced", anchors=1, inputs={"force": True})
    assert summarise(folder)["fingerprint"] == new.fingerprint != old.fingerprint


def test_rebuild_leaves_no_file_of_replaced_or_killed_builds(bench: Bench) -> None:
    folder = bench.folder / "replaced"
    bench.build("replaced", directions=2)
    (folder / BASELINES).mkdir()
    assert (folder / ROWS_FILE).exists() and (folder / COORDINATES_FILE).exists()
    manifest = bench.build("replaced", anchors=1, directions=0, inputs={"force": True})
    (folder / WORK_FOLDER / "pieces").mkdir(parents=True)
    assert bench.build("replaced", anchors=1, directions=0) == manifest
    assert {path.name for path in folder.iterdir()} == {*manifest.files, MANIFEST_FILE}


def test_directions_replace_anchor_rows_kept_beside_the_bank(bench: Bench, built: BankManifest) -> None:
    progress, folder = Recorder(), bench.folder / "directions"
    manifest = bench.build("directions", progress, directions=2)
    assert (len(manifest.anchors), manifest.directions) == (3, 2)
    assert any(said.startswith("the rows are 2 directions of 3 anchors") for said in progress.said)
    people, anchors = bench.matrix("plain", built), open_anchor_rows(folder, manifest)
    assert torch.equal(anchors.rows, people.rows)
    rows = bench.matrix("directions", manifest).rows
    assert torch.equal(rows[-1], people.rows[-1])
    seen = Signature(manifest.short, 1000, np.array([1.0, -1.0], np.float32))
    serving = ServingBank.open(folder, manifest.embedder.id)
    found = serving.personalise(serving.index.vectors([1])[0], seen)
    assert len(found.recipe.steps) == 2 and found.recipe.steps[0] > 0 > found.recipe.steps[1]
    result = CliRunner().invoke(app, ["bank", "info", str(folder)])
    assert "2 directions" in result.output
    removed = bench.folder / "removed"
    result = CliRunner().invoke(app, ["bank", "remove", str(folder), "--anchor", "a01", "--out", str(removed)])
    assert "2 anchors, without a01" in result.output
    assert torch.equal(open_anchor_rows(removed, read_manifest(removed)).rows, people.rows[[0, 2, 3]])


class Killer(Recorder):
    """Ends a build at the first step of a row, or once two people are measured."""

    def __init__(self, row: str = "") -> None:
        super().__init__()
        self._row = row

    def step(self, row: str, steps: int, report: StepReport) -> None:
        super().step(row, steps, report)
        if row == self._row:
            raise KeyboardInterrupt

    def piece(self, what: str, done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt


def test_killed_build_resumes_to_the_same_fingerprint(bench: Bench, built: BankManifest) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.build("killed", Killer("a01"))
    assert not (bench.folder / "killed" / MANIFEST_FILE).exists()
    finished = {path.name for path in (bench.folder / "killed").glob(f"{WORK_FOLDER}/*/*")}
    assert finished == {"inputs.json", "candidates-0000.npy", "anchors-0000.npy", "common.npy", "rows.bf16"}
    with pytest.raises(BankError, match=r"--steps was 3, is 4\): run that again.*--force"):
        bench.build("killed", steps=4)
    progress = Killer()
    with pytest.raises(KeyboardInterrupt):
        bench.build("killed", progress)
    assert "2 of 4 rows were finished in an earlier run" in progress.said
    assert progress.begun == ["a01", "a02"]
    last = Recorder()
    assert bench.build("killed", last, dtype="auto").fingerprint == built.fingerprint
    assert last.begun == []


def test_any_number_of_ranks_builds_the_same_bank(bench: Bench, built: BankManifest) -> None:
    progress, defaults = Recorder(), asdict(BuildOptions("chat"))
    assert bench.build_by_ranks("two", 2, progress).fingerprint == built.fingerprint
    assert progress.begun == ["common", "a00", "a02"]  # the other rank trains the other row
    options = {name: value for name, value in asdict(OPTIONS).items() if value != defaults[name]}
    options |= {"task": "chat", "users": bench.users, "out": bench.folder / "torchrun", "model": bench.model}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**options, "embedder": bench.embedder}.items()]
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    subprocess.run([sys.executable, "-m", *torchrun, "-m", "server.cli", "bank", "build", *flags], check=True)
    assert read_manifest(bench.folder / "torchrun").fingerprint == built.fingerprint


class RankKiller(Recorder):
    """Kills the other ranks once the common row is trained."""

    def step(self, row: str, steps: int, report: StepReport) -> None:
        if row == "a00":
            for other in multiprocessing.active_children():
                other.kill()


def test_build_that_loses_a_rank_fails_and_resumes_on_rerun(bench: Bench, built: BankManifest) -> None:
    with pytest.raises(BankError, match=r"a process of the build ended .*run the same command again to continue"):
        bench.build_by_ranks("lost", 2, RankKiller())
    progress = Recorder()
    assert bench.build("lost", progress).fingerprint == built.fingerprint
    assert progress.begun == ["a00", "a01", "a02"]


class Unreadable:
    """Ends a process that is to run it."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)

    def __call__(self, ranks: Ranks) -> None: ...


def test_a_rank_that_ends_before_it_joins_is_not_waited_for() -> None:
    with pytest.raises(BankError, match="ended with status 9"), joined(2, Unreadable()):
        pass


def test_what_one_rank_refuses_all_ranks_refuse(bench: Bench, tmp_path: Path) -> None:
    bench.build("taken", anchors=1)
    with pytest.raises(BankError, match="another bank"):
        bench.build_by_ranks("taken", 2, Recorder())
    other = bench.inputs("unlike", users=write_people(tmp_path / "other.json", people(4)))
    with (
        pytest.raises(BankError, match="the ranks would build different banks"),
        joined(2, partial(build_bank, other, OPTIONS, RowProgress())) as ranks,
    ):
        build_bank(bench.inputs("unlike"), OPTIONS, Recorder(), ranks)


def test_build_without_terminal_prints_lines_and_one_error(bench: Bench) -> None:
    options = {"users": bench.users, "task": "chat", "out": bench.folder / "lines", "model": bench.model}
    options |= {"embedder": bench.embedder, "anchors": 1, "rank": 4, "steps": 8, "common-steps": 5, "dtype": "float32"}
    command = ["bank", "build", *(f"--{option}={value}" for option, value in options.items())]
    done = CliRunner().invoke(app, command)
    last = [line for line in done.stderr.splitlines() if line.startswith("training ")][-1]
    assert last.startswith("training a00 (2 of 2)  step 8/8  loss ")
    assert last.endswith("min left")
    assert done.stdout.startswith("bank ")
    refused = [sys.executable, "-m", "server.cli", *command, "--exclude", "/nowhere.json"]
    ran = subprocess.run(refused, check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "error: cannot read /nowhere.json: No such file or directory\n")


def recalled(tokenizer: Any, examples: Sequence[Example]) -> int:
    """How many examples have a past item in the prompt."""
    texts = [tokenizer.decode(list(example.ids[: example.loss_from])) for example in examples]
    return sum("is the answer to" in text for text in texts)


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Example]]:
    """The samples of each training of a user adapter, as it begins."""
    seen: list[Sequence[Example]] = []

    def spying(model: Any, fused: Any, samples: Sequence[Example], plan: Any) -> object:
        seen.append(samples)
        return train_user(model, fused, samples, plan)

    monkeypatch.setattr("evaluation.methods.train_user", spying)
    return seen


def test_rows_act_where_the_bank_says_and_share_the_common_row(bench: Bench, built: BankManifest) -> None:
    acting = bench.build("acting", acts=Acts.ANSWER)
    assert (acting.acts, acting.shares_prompts, built.shares_prompts) == (Acts.ANSWER, True, False)
    other, plain = bench.matrix("acting", acting), bench.matrix("plain", built)
    assert torch.equal(other.rows[other.anchors], plain.rows[plain.anchors])
    assert not torch.allclose(other.rows[0].float(), plain.rows[0].float(), rtol=0.1)
    shared = shared_part(other, acting)
    assert shared is not None
    assert torch.equal(flattened(acting.layout, shared.lora.b), other.rows[other.anchors].float())
    assert shared_part(plain, built) is None


def test_history_share_puts_the_past_into_training_prompts(
    bench: Bench, built: BankManifest, trained_on: list[Sequence[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: dict[str, tuple[int, int]] = {}
    make = RowTrainer.job

    def spying(trainer: RowTrainer, name: str, *rest: Any) -> RowJob:
        job = make(trainer, name, *rest)
        jobs[name] = (recalled(trainer.tokenizer, job.examples), len(job.examples))
        return job

    monkeypatch.setattr(RowTrainer, "job", spying)
    knowing = bench.build("knowing", history_share=1.0)
    build_baselines(bench.inputs("knowing"), replace(OPTIONS, history_share=1.0), knowing, Recorder())
    assert (knowing.history_share, built.history_share) == (1.0, 0.0)
    assert list(jobs) == ["common", "a00", "a01", "a02", "task"]
    assert all(with_past >= count - 5 > 0 for with_past, count in jobs.values())  # all but each person's first item

    embedder, scorer = Embedder.load(bench.embedder), Scorer(*load_base(bench.model, "float32"))
    (history, *_) = read_histories(bench.users, CHAT)
    user, config = replace(history, queries=(Query("q", "Say 99", "99"),)), AdaptConfig(rank=1, steps=1)
    for name in ("knowing", "plain"):
        bank = OpenBank.open(bench.folder / name, embedder.id)
        evaluator = Evaluator(bank=bank, scorer=scorer, embedder=embedder, max_tokens=512, config=config)
        evidence = evaluator.evidence(user)
        evaluator.adapter(METHODS["own"], evidence, 0)
        assert recalled(scorer.tokenizer, evidence.signature_examples) == 0
    assert [recalled(scorer.tokenizer, samples) for samples in trained_on] == [len(history.items) - 1, 0]


def test_bank_is_judged_once_on_held_out_people(bench: Bench, built: BankManifest) -> None:
    users = write_people(bench.folder / "many.json", people(26))
    where = bench.inputs("judged", users=users)
    kept, aside = read_inputs(where, CHAT, OPTIONS)
    assert (len(kept), len(aside)) == (20, 6)
    assert not {person.user_id for person in kept} & {person.user_id for person in aside}
    assert read_inputs(where, CHAT, replace(OPTIONS, verdict=False))[1] == []
    manifest, progress = bench.build("judged", inputs={"users": users}), Recorder()
    assert manifest.training["people"] == 20
    judged = judge_bank(where, OPTIONS, manifest, progress)
    assert judged == read_manifest(where.out)
    assert judged.verdict and judged.verdict.people == 6
    measured = {name + past for name in ("common", "merged") for past in ("", "+history@h1", "+history@h3")}
    assert judged.verdict.losses.keys() == measured | {"merged+words"}
    assert judged.verdict.merged.low <= judged.verdict.merged.mean <= judged.verdict.merged.high
    assert progress.pieces[-1] == ("measuring on held-out people", 6, 6)
    assert judge_bank(where, OPTIONS, judged, progress) is judged
    assert bench.build("judged", inputs={"users": users}) == judged
    assert "6 people left out" in summarise(where.out)["in_words"]

    assert judge_bank(bench.inputs("plain"), OPTIONS, built, progress) is built
    assert "too few people" in progress.said[-1]
    assert summarise(bench.folder / "plain")["verdict"] is None
