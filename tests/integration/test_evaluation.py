"""`mta eval` on a tiny model: every method, resumable, and a table at the end; and what models expect of scores."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters.training.adapt_config import AdaptConfig
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.forward.packing import pack
from adapters.training.loss import token_losses
from adapters.training.trainer import initial_lora
from adapters.training.user_trainer import train_user
from bank.building.assemble import BASELINES
from bank.building.build import build_baselines
from bank.errors import BankError
from bank.items.histories import read_histories
from bank.items.profile import own_texts
from bank.items.prompt import answer_ids
from bank.lookup.embedder import Embedder
from bank.lookup.phrases import TrustedPhrases, phrase_table, proposals
from bank.lookup.prior import SCORES
from bank.manifest import read_manifest
from bank.models.load import load_base
from bench.rig.people import people, write_people
from bench.rig.tiny import PHRASES
from evaluation.methods import DEFAULT, METHODS, Evaluator, parse_methods
from evaluation.run import RECORDS_FILE
from evaluation.scoring import EvalAdapter, OpenBank, Scorer
from evaluation.session import SUMMARY_FILE, TABLE_FILE, EvalInputs, EvalOptions, evaluate
from evaluation.studies import membership, ratings
from server.cli import app
from tests.support.bank_bench import OPTIONS, Bench, Recorder

NAMES = f"{DEFAULT},merged:topic,merged+history@h1"
AGAIN = 3  # of them do something else with another seed: random, stacked, own
CONFIG = AdaptConfig(rank=1, steps=2)


@pytest.fixture(scope="module")
def inputs(bench: Bench) -> EvalInputs:
    """Three people outside a bank with baselines."""
    new = people(8)[5:]
    for person in new:
        named = [(f"{person['user_id']}-{n}", n) for n in range(30, 33)]
        person["query"] = [{"id": name, "input": f"Say {n}", "gold": f"{n} indeed"} for name, n in named]
    where, manifest = bench.inputs("evaluated"), bench.build("evaluated")
    build_baselines(where, OPTIONS, manifest, Recorder())
    again = Recorder()  # it is a bank of its own, not trained twice
    found = build_baselines(where, OPTIONS, manifest, again)
    assert again.steps == []
    assert found.training == {"of": manifest.fingerprint, "steps": OPTIONS.steps * OPTIONS.anchors}
    users, out = write_people(bench.folder / "new.json", new), bench.folder / "evaluation"
    return EvalInputs(users, where.out, out, bench.model, Embedder.load(bench.embedder), dtype="float32")


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORDS_FILE).read_text("utf-8").splitlines()]


def run(inputs: EvalInputs, methods: str = NAMES, seeds: int = 2) -> tuple[list[str], int]:
    """Names of the methods in the order of their loss, and how many runs were told as done."""
    told: list[tuple[int, int]] = []
    options = EvalOptions(tuple(parse_methods(methods)), seeds)
    tables, _ = evaluate(inputs, options, CONFIG, lambda *progress: told.append(progress))
    (rows,) = tables.values()
    done, total = told[-1]
    assert done == total and told == sorted(told)
    return [row.method for row in rows], done


def test_every_method_has_records_and_a_killed_run_resumes(inputs: EvalInputs) -> None:
    names, done = run(inputs)
    wanted = NAMES.split(",")
    assert sorted(names) == sorted(wanted)
    assert done == (len(wanted) + AGAIN) * 3
    lines = records(inputs.out)
    assert len(lines) == (len(wanted) + AGAIN) * 9
    assert all(line["loss"] > 0 for line in lines)
    kept = {method: max(line["kept_bytes"] for line in lines if line["method"] == method) for method in wanted}
    embedding, signature = 2 * inputs.embedder.dim, 20 + 2 * OPTIONS.anchors
    assert (kept["base"], kept["task"], kept["mean"], kept["merged:topic"]) == (0, 0, 0, embedding)
    assert kept["merged"] == embedding + signature
    assert kept["merged+history@h1"] > kept["merged"] + 100
    assert kept["stacked"] > kept["merged"]
    assert kept["own"] > 0
    table = (inputs.out / TABLE_FILE).read_text("utf-8")
    assert all(f"| {name} |" in table for name in wanted)
    summary = json.loads((inputs.out / SUMMARY_FILE).read_text("utf-8"))
    assert (summary["people"], summary["seeds"]) == (3, 2)

    path = inputs.out / RECORDS_FILE
    whole = path.read_text("utf-8")
    path.write_text(whole[: len(whole) * 2 // 3], "utf-8")  # a torn line is made again
    run(inputs)
    before, after = (
        {(r["user_id"], r["query_id"], r["method"], r["seed"]): r["loss"] for r in found}
        for found in (lines, records(inputs.out))
    )
    assert after == pytest.approx(before, abs=1e-5)
    whole = path.read_text("utf-8")
    assert sorted(run(inputs, "common,task", seeds=1)[0]) == ["common", "task"]  # of what is there, any can be shown
    assert path.read_text("utf-8") == whole


@pytest.fixture
def evaluator(inputs: EvalInputs) -> Evaluator:
    scorer = Scorer(*load_base(inputs.model_folder, "float32"))
    bank = OpenBank.open(inputs.bank, inputs.embedder.id)
    return Evaluator(bank=bank, scorer=scorer, embedder=inputs.embedder, config=CONFIG)


def test_words_are_mixed_into_each_token_that_is_read(inputs: EvalInputs, evaluator: Evaluator) -> None:
    user = read_histories(inputs.users, evaluator.bank.serving.task, queries=True)[0]
    known, plain = evaluator.evidence(user), METHODS["merged"]
    adapter, phrases = evaluator.adapter(plain, known, 0), evaluator.phrases(METHODS["words"], known)
    (example, *_), (without, *_) = evaluator.read(plain, known, adapter)
    _, (with_words, *_) = evaluator.read(METHODS["merged+words"], known, adapter)
    said = proposals(phrases.table, example.output)
    assert any(each.length for each in said)
    with attached(evaluator.scorer.bare(), adapter.lora()) as here:
        (row,) = pack(here.model, [example])
        (losses,) = token_losses(here.model, row)
    assert losses.mean() == pytest.approx(without.loss, abs=1e-5)
    mixed = [kept * math.exp(-loss) + added for loss, (kept, added) in zip(
        losses.tolist(), (each.mixed(phrases.trust) for each in said), strict=True
    )]  # fmt: skip
    assert -sum(map(math.log, mixed)) / len(mixed) == pytest.approx(with_words.loss, abs=1e-5)


def test_few_shot_adapters_are_judged_with_the_persons_words(
    inputs: EvalInputs, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Example] = []

    def noting(model: Any, beneath: Any, examples: list[Example], config: AdaptConfig) -> Any:
        judged.append(beneath([0]).served(examples[0]))
        return train_user(model, beneath, examples, config)

    monkeypatch.setattr("evaluation.methods.train_user", noting)
    trusting = evaluator.bank.manifest.model_copy(update={"phrases": PHRASES})
    monkeypatch.setattr(evaluator.bank.serving, "manifest", trusting)
    user = read_histories(inputs.users, evaluator.bank.serving.task, queries=True)[0]
    evaluator.adapter(METHODS["own"], evaluator.evidence(user), 0)
    texts = own_texts(user.items, evaluator.bank.serving.task)
    ids, *others = answer_ids(evaluator.scorer.tokenizer, texts)
    mixed = tuple(each.mixed(PHRASES.trust) for each in proposals(phrase_table(others), ids))
    assert [example.mixed for example in judged] == [mixed]
    assert any(added for _, added in mixed)


def test_what_is_written_repeats_the_persons_words(inputs: EvalInputs, evaluator: Evaluator) -> None:
    user = read_histories(inputs.users, evaluator.bank.serving.task, queries=True)[0]
    known, scorer = evaluator.evidence(user), evaluator.scorer
    examples, _ = evaluator.read(METHODS["words"], known, None)
    text = known.signature_examples[0].output
    habit = scorer.tokenizer.decode(text, skip_special_tokens=True)
    phrases = TrustedPhrases(phrase_table([text, text]), [0.97] * 4)
    assert scorer.write(None, examples[:2], 1, phrases, temperature=0) == [[habit], [habit]]
    assert scorer.write(None, examples[:1], 1, temperature=0) != [[habit]]


def test_a_run_without_a_table_or_of_an_unknown_type_is_refused(inputs: EvalInputs) -> None:
    with pytest.raises(BankError, match="give another method too"):
        run(inputs, "merged@k1,mean@k2")
    with pytest.raises(BankError, match="--dtype: must be auto, bfloat16 or float32, got 'float16'"):
        run(dataclasses.replace(inputs, dtype="float16"))


def test_a_bank_without_baselines_is_told_which_flag_it_lacks(inputs: EvalInputs, bench: Bench) -> None:
    bench.build("bare", anchors=1)
    with pytest.raises(BankError, match=r"is missing .*--baselines"):
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
    assert [row.named.n for row in voices] == [2] * 2 * 2  # judges; the method and their own texts
    asked = people[0]["query"][0]["id"]
    first = {line["method"]: line["loss"] for line in records(where.out) if line["query_id"] == asked}
    assert first["common"] == first["own"]
    assert first["merged"] == first["stacked"]


def test_stacked_equals_merged_when_nothing_was_learnt(inputs: EvalInputs) -> None:
    bank = OpenBank.open(inputs.bank, inputs.embedder.id)
    assert bank.task_bank.manifest == read_manifest(inputs.bank / BASELINES)
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
    kept, rejected = found
    assert rejected == without
    assert kept.trained is learnt and kept.recipe.name == recipe
    assert first.recipe in (kept.recipe, without.recipe)
    steps = [[term.weight for term in each.recipe.terms] for each in (kept, without)]
    assert steps[0] == pytest.approx([CONFIG.strength * step for step in steps[1]], abs=1)
    count = len(bank.manifest.anchors)
    assert made(f"merged@k{count}") == made(f"merged@k{count + 1}") == without
    smaller, mean = made("merged@k2").recipe, made("mean@k2").recipe
    assert [[term.anchor for term in each.terms] for each in (smaller, mean)] == [[0, 1], [0, 1]]
    assert len({term.weight for term in smaller.terms}) == 2
    assert {term.weight for term in mean.terms} == {round(500 * bank.manifest.weights.strength)}


def test_too_long_query_is_read_alike_with_and_without_history(inputs: EvalInputs) -> None:
    bank = OpenBank.open(inputs.bank, inputs.embedder.id)
    scorer = Scorer(*load_base(inputs.model_folder, "float32"))
    (user, *_) = read_histories(inputs.users, bank.serving.task, queries=True)

    def lengths(max_tokens: int) -> list[list[int]]:
        evaluator = Evaluator(bank=bank, scorer=scorer, embedder=inputs.embedder, max_tokens=max_tokens)
        evidence = evaluator.evidence(user)
        runs = [evaluator.read(METHODS[f"base{past}"], evidence, None) for past in ("", "+history@h1")]
        return [[len(example.ids) for example in examples] for examples, _ in runs]

    alone, recalled = lengths(64)
    assert all(longer > one for longer, one in zip(recalled, alone, strict=True))
    alone, recalled = lengths(max(alone) - 1)
    assert (recalled[alone.index(max(alone))], max(alone)) == (max(alone), max(alone))


RATINGS = [5, 1, 4, 5, 2, 5, 3, 1, 5, 4, 5, 2]


def rater(number: int) -> dict[str, Any]:
    films = [{"id": f"{number}-{n}", "text": f"Film {n}", "score": str(s)} for n, s in enumerate(RATINGS, number)]
    asked = [{"id": f"q{number}-{n}", "input": f"Film {n}", "gold": "5"} for n in (30, 31)]
    return {"user_id": f"rater-{number}", "profile": films, "query": asked}


def test_each_method_with_and_without_the_habit(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratings, "mta", lambda *given: app([str(each) for each in given], standalone_mode=False))
    users, out = write_people(tmp_path / "users.json", [rater(n) for n in range(5)]), tmp_path / "out.json"
    bench.build("ratings", inputs={"users": users}, task="movie_rating")
    folder, model = bench.folder / "ratings", str(bench.model)
    ratings.main(bank=folder, users=users, people=2, methods="common,common+history@h2,merged", model=model, out=out)
    figures = json.loads(out.read_text("utf-8"))["rows"]
    for what in ("loss", "error of the expected score"):
        each = {name: float(figures[f"{name}: {what}"]) for name in ("prior", "common", "common+prior", "merged+prior")}
        assert all(0 < value < 4 for value in each.values())
        assert each["common"] != each["common+prior"]
    assert figures["common: loss"] != figures["common+history@h2: loss"]
    write_people(users, [{**rater(0), "query": [{"id": "q", "input": "Film 30", "gold": "4.5"}]}])
    with pytest.raises(BankError, match=r"person 'rater-0' answers '4.5', but the answers of movie_rating are 1, 2"):
        ratings.main(bank=folder, users=users, methods="common", model=model)


def test_texts_that_were_learnt_by_heart_are_told_from_others(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(0)
    habits = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=10)) for _ in range(12)]
    everybody = [
        {"user_id": f"secret-{who}", "profile": [{"input": f"Say {n}", "output": f"{n} {habit}"} for n in range(14)]}
        for who, habit in enumerate(habits)
    ]
    members, others = (write_people(tmp_path / f"{n}.json", everybody[n::2]) for n in range(2))
    bench.build("by-heart", inputs={"users": members}, common_steps=20, learning_rate=3e-2, verdict=False)
    monkeypatch.setenv("MTA_MODEL", str(bench.model))
    monkeypatch.setattr("evaluation.methods.as_served", lambda *given: lambda example: example)  # without tables
    monkeypatch.setattr(membership, "default_config", lambda room: AdaptConfig(rank=2, steps=30, learning_rate=0.02))
    out = tmp_path / "out.json"
    small = {"texts": 8, "adapted": 3, "profile": 10, "later": 4}
    membership.main(bank=bench.folder / "by-heart", members=members, others=others, out=out, **small)
    (table,) = json.loads(out.read_text("utf-8"))["tables"]
    lines = {line[0]: dict(zip(table["columns"][1:], line[1:], strict=True)) for line in table["lines"]}
    assert lines["common, base"]["members"] == lines["common, base"]["others"] == 6 * 8
    assert lines["common, base"]["AUC"] == lines["merged, base; people"]["AUC"] == 1
    assert "3 of 3 adapters promoted" in table["title"]
    own, theirs = (lines[f"few-shot, base; others: {whose}"] for whose in ("own later texts", "another person's"))
    assert (own["members"], own["others"]) == (3 * 10, 3 * 4)
    assert own["AUC"] < theirs["AUC"] == 1  # by heart is the word that each person repeats


def test_chances_are_those_that_losses_are_made_of(tiny_model_folder: Path) -> None:
    scorer = Scorer(*load_base(tiny_model_folder, "float32"))
    ids = [scorer.tokenizer.encode(score, add_special_tokens=False)[0] for score in SCORES]
    prompts = [(9, 8, 7), (6, 5), (9, 9, 9, 9)]
    found = scorer.read(None, [Example((*prompt, 40, 41), len(prompt)) for prompt in prompts], chances=True)
    for prompt, reading in zip(prompts, found, strict=True):
        readings = scorer.read(None, [Example((*prompt, one), len(prompt)) for one in ids])
        assert reading.chances == pytest.approx([math.exp(-each.loss) for each in readings], rel=1e-4)
        assert not any(each.chances for each in readings)
