"""`mta eval` on a tiny model: every method, resumable, and a table at the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from adapters.training.adapt_config import AdaptConfig
from adapters.training.trainer import initial_lora
from bank.building.build import BASELINES, build_baselines
from bank.building.options import BuildInputs
from bank.errors import BankError
from bank.evaluation.methods import DEFAULT, METHODS, Evaluator, parse_methods
from bank.evaluation.run import RECORDS_FILE, EvalOptions
from bank.evaluation.scoring import EvalAdapter, OpenBank, Scorer
from bank.evaluation.session import SUMMARY_FILE, TABLE_FILE, EvalInputs, evaluate
from bank.items.histories import read_histories
from bank.lookup.embedder import Embedder
from bank.manifest import read_manifest
from bank.models.load import load_base
from bench.rig.people import people, write_people
from tests.support.bank_bench import OPTIONS, Bench, Recorder

NAMES = f"{DEFAULT},merged:topic,merged+history@h1"
AGAIN = 3  # of them do something else with another seed: random, stacked, own
CONFIG = AdaptConfig(rank=1, steps=2)


@pytest.fixture(scope="module")
def inputs(bench: Bench, embedder_folder: Path) -> EvalInputs:
    """Three people outside a bank with baselines."""
    known, new = people(8)[:5], people(8)[5:]
    for person in new:
        person["query"] = [
            {"id": f"{person['user_id']}-{n}", "input": f"Say {n}", "gold": f"{n} indeed"} for n in range(30, 33)
        ]
    where = BuildInputs(
        users=write_people(bench.folder / "known.json", known),
        out=bench.folder / "evaluated",
        model=str(bench.model),
        embedder=bench.embedder,
        cache_dir=bench.folder,
    )
    manifest = bench.build("evaluated", inputs={"users": where.users})
    build_baselines(where, OPTIONS, manifest, Recorder())
    return EvalInputs(
        users=write_people(bench.folder / "new.json", new),
        bank=where.out,
        out=bench.folder / "evaluation",
        model_folder=bench.model,
        embedder=Embedder.load(embedder_folder),
        dtype="float32",
    )


def run(inputs: EvalInputs, methods: str = NAMES, seeds: int = 2) -> tuple[list[str], int]:
    """Names of the methods in the order of their loss, and how many runs were told as done."""
    told: list[tuple[int, int]] = []
    options = EvalOptions(tuple(parse_methods(methods)), seeds)
    tables, _ = evaluate(inputs, options, CONFIG, lambda *progress: told.append(progress))
    (rows,) = tables.values()
    done, total = told[-1]
    assert done == total and told == sorted(told)
    return [row.method for row in rows], done


def test_every_method_has_a_record_of_every_query_and_a_row_in_the_table(inputs: EvalInputs) -> None:
    names, done = run(inputs)
    wanted = NAMES.split(",")
    assert sorted(names) == sorted(wanted)
    assert done == (len(wanted) + AGAIN) * 3
    lines = [json.loads(line) for line in (inputs.out / RECORDS_FILE).read_text("utf-8").splitlines()]
    assert len(lines) == (len(wanted) + AGAIN) * 9
    assert {line["method"] for line in lines} == set(wanted)
    assert all(line["loss"] > 0 for line in lines)
    kept = {method: max(line["kept_bytes"] for line in lines if line["method"] == method) for method in wanted}
    embedding, signature = 2 * inputs.embedder.dim, 4 * OPTIONS.anchors
    assert (kept["base"], kept["task"], kept["mean"], kept["merged:topic"]) == (0, 0, 0, embedding)
    assert kept["merged"] == embedding + signature
    assert kept["merged+history@h1"] > kept["merged"] + 100
    assert kept["stacked"] > kept["merged"]
    assert kept["own"] > 0
    table = (inputs.out / TABLE_FILE).read_text("utf-8")
    assert all(f"| {name} |" in table for name in wanted)
    summary = json.loads((inputs.out / SUMMARY_FILE).read_text("utf-8"))
    assert (summary["people"], summary["seeds"]) == (3, 2)
    assert {path.suffix for path in inputs.out.iterdir()} >= {".png", ".md", ".json", ".jsonl"}


def test_a_killed_run_goes_on_a_torn_line_is_made_again_and_of_what_is_there_any_methods_are_shown(
    inputs: EvalInputs,
) -> None:
    run(inputs)
    path = inputs.out / RECORDS_FILE
    whole = path.read_text("utf-8")
    path.write_text(whole[: len(whole) * 2 // 3], "utf-8")
    run(inputs)
    before, after = (
        {(r["user_id"], r["query_id"], r["method"], r["seed"]): r["loss"] for r in map(json.loads, text.splitlines())}
        for text in (whole, path.read_text("utf-8"))
    )
    assert after == pytest.approx(before, abs=1e-5)
    whole = path.read_text("utf-8")
    assert sorted(run(inputs, "common,task", seeds=1)[0]) == ["common", "task"]
    assert path.read_text("utf-8") == whole


def test_a_bank_without_baselines_is_told_which_flag_it_lacks(inputs: EvalInputs, bench: Bench) -> None:
    bench.build("bare", seed=1)
    with pytest.raises(BankError, match="--baselines"):
        run(dataclasses.replace(inputs, bank=bench.folder / "bare"))
    shutil.copytree(inputs.bank / BASELINES, bench.folder / "bare" / BASELINES)
    with pytest.raises(BankError, match="belongs to another bank"):
        run(dataclasses.replace(inputs, bank=bench.folder / "bare"))


def test_of_plain_text_nothing_is_learnt(inputs: EvalInputs, bench: Bench) -> None:
    """And whoever has nothing else is evaluated as somebody of whom only topics are known."""
    people = json.loads(inputs.users.read_text("utf-8"))
    for item in people[0]["profile"]:
        item["text"] = item.pop("input") + item.pop("output")
    people[0]["id"] = people[0].pop("user_id")
    users = write_people(bench.folder / "plain.json", people)
    where = dataclasses.replace(inputs, users=users, out=bench.folder / "plain")
    chosen = tuple(parse_methods("common,merged,own,stacked"))
    options = EvalOptions(chosen, predict=False, writing=chosen[:1])
    _, voices = evaluate(where, options, CONFIG, lambda done, total: None)
    assert [row.named.n for row in voices] == [2] * 2
    lines = [json.loads(line) for line in (where.out / RECORDS_FILE).read_text("utf-8").splitlines()]
    first = {line["method"]: line["loss"] for line in lines if line["query_id"] == people[0]["query"][0]["id"]}
    assert first["common"] == first["own"]
    assert first["merged"] == first["stacked"]


def test_the_baselines_are_a_bank_of_their_own_that_is_not_trained_twice(inputs: EvalInputs) -> None:
    manifest = read_manifest(inputs.bank)
    recorder = Recorder()
    where = BuildInputs(inputs.users, inputs.bank, str(inputs.model_folder), inputs.bank)
    found = build_baselines(where, OPTIONS, manifest, recorder)
    assert recorder.steps == []
    assert found.training == {"of": manifest.fingerprint, "steps": OPTIONS.steps * OPTIONS.anchors}


def test_stacked_stands_on_half_the_anchors_and_is_merged_when_nothing_was_learnt(inputs: EvalInputs) -> None:
    bank = OpenBank.open(inputs.bank, inputs.embedder.id)
    scorer = Scorer(*load_base(inputs.model_folder, "float32"))
    evaluator = Evaluator(bank=bank, scorer=scorer, embedder=inputs.embedder, max_tokens=64, config=CONFIG)
    evidence = evaluator.evidence(read_histories(inputs.users, bank.serving.task, queries=True)[0])

    def made(name: str) -> EvalAdapter:
        found = evaluator.adapter(METHODS[name], evidence, 0)
        assert found is not None
        return found

    without, first = made("merged"), made("stacked")
    ((recipe, _),) = evidence.trained
    learnt = initial_lora(bank.manifest.layout.modules, 1, seed=0)
    found = []
    for weights in (learnt, None):
        evidence.trained[recipe, 0] = weights
        found.append(made("stacked"))
    scorer.bare()
    kept, rejected = found
    assert rejected == without
    assert kept.trained is learnt and kept.recipe.name == recipe
    assert first.recipe in (kept.recipe, without.recipe)
    steps = [[term.weight for term in each.recipe.terms] for each in (kept, without)]
    assert steps[0] == pytest.approx([CONFIG.strength * step for step in steps[1]], abs=1)
