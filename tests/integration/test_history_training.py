"""Rows and user adapters that know history, and a bank measured on people left out of it; on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.training.adapt_config import AdaptConfig
from adapters.training.example import Example
from adapters.training.user_trainer import train_user
from bank.building.build import build_baselines, read_inputs
from bank.building.options import BuildInputs
from bank.building.rows import row_job
from bank.evaluation.methods import METHODS, Evaluator
from bank.evaluation.scoring import OpenBank, Scorer
from bank.evaluation.verdict import judge_bank
from bank.items.histories import Query, read_histories
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.lookup.summary import summarise
from bank.manifest import BankManifest, read_manifest
from bank.models.load import load_base
from bench.rig.people import people, write_people
from server.store.jobs import JobState
from server.worker.loops import JobLoop
from server.worker.training import AdapterTrainer
from tests.support.bank_bench import OPTIONS, Bench, Recorder
from tests.support.desk import Desk

CHAT = get_task("chat")
KNOWING = replace(OPTIONS, history_share=1.0)


def recalls(tokenizer: object, example: Example) -> bool:
    """Whether there is a past item in the prompt."""
    text: str = tokenizer.decode(list(example.ids[: example.loss_from]))  # type: ignore[attr-defined]
    return "is the answer to" in text


@pytest.fixture(scope="module")
def knowing(bench: Bench) -> BankManifest:
    return bench.build("knowing", history_share=1.0)


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Example]]:
    """The samples of each training of a user adapter, as it begins."""
    seen: list[Sequence[Example]] = []

    def spying(model: object, fused: object, samples: Sequence[Example], plan: object) -> object:
        seen.append(samples)
        return train_user(model, fused, samples, plan)  # type: ignore[arg-type]

    for module in ("bank.evaluation.methods", "server.worker.training"):
        monkeypatch.setattr(f"{module}.train_user", spying)
    return seen


def test_rows_are_trained_with_the_past_in_the_prompt_and_the_manifest_says_so(
    bench: Bench, knowing: BankManifest, built: BankManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (knowing.history_share, built.history_share) == (1.0, 0.0)
    jobs: dict[str, list[bool]] = {}

    def spying(name: str, lessons: Sequence[object], plan: object, tokenizer: object, longest: int) -> object:
        made = row_job(name, lessons, plan, tokenizer, longest)  # type: ignore[arg-type]
        jobs[name] = [recalls(tokenizer, example) for example in made.examples]
        return made

    monkeypatch.setattr("bank.building.rows.row_job", spying)
    monkeypatch.setattr("bank.building.build.row_job", spying)
    again = bench.build("knowing-again", history_share=1.0)
    where = BuildInputs(bench.users, bench.folder / "knowing-again", str(bench.model), bench.folder)
    build_baselines(replace(where, embedder=bench.embedder), KNOWING, again, Recorder())
    assert list(jobs) == ["common", "a00", "a01", "a02", "task"]
    assert all(sum(made) >= len(made) - 5 > 0 for made in jobs.values())  # all but each person's first item
    assert again.fingerprint == knowing.fingerprint


def test_user_adapters_are_evaluated_as_the_bank_was_trained(
    bench: Bench, knowing: BankManifest, built: BankManifest, embedder_folder: Path, trained_on: list[Sequence[Example]]
) -> None:
    embedder = Embedder.load(embedder_folder)
    (history, *_) = read_histories(bench.users, CHAT)
    user = replace(history, queries=(Query("q", "Say 99", "99"),))
    scorer = Scorer(*load_base(bench.model, "float32"))
    config = AdaptConfig(rank=1, steps=1)
    for name in ("knowing", "plain"):
        bank = OpenBank.open(bench.folder / name, embedder.id)
        evaluator = Evaluator(bank=bank, scorer=scorer, embedder=embedder, max_tokens=512, config=config)
        evidence = evaluator.evidence(user)
        evaluator.adapter(METHODS["own"], evidence, 0)
        assert not any(recalls(scorer.tokenizer, example) for example in evidence.signature_examples)
    counts = [sum(recalls(scorer.tokenizer, example) for example in samples) for samples in trained_on]
    assert counts == [len(history.items) - 1, 0]


async def test_a_worker_puts_the_users_items_before_samples_where_the_bank_knows_history(
    desk: Desk, trainer: AdapterTrainer, tiny_bank_folder: Path, trained_on: list[Sequence[Example]]
) -> None:
    opened = ServingBank.open(tiny_bank_folder, trainer.manifest.embedder.id)
    manifest = trainer.manifest.model_copy(update={"training": trainer.manifest.training | {"history_share": 1.0}})
    knowing_trainer = AdapterTrainer(manifest, trainer.matrix, trainer.model, trainer.tokenizer)
    for trains in (trainer, knowing_trainer):
        bank = ServingBank(trains.manifest, opened.index, opened.atlas)
        user = await desk.user(("how is the bread?", "crusty"))
        job = await desk.submit(user=user)
        await JobLoop(desk.jobs, desk.profiles, bank, trains).work_once(0.1)
        assert (await desk.job(job)).state in (JobState.SUCCEEDED, JobState.REJECTED)
    assert [{recalls(trainer.tokenizer, example) for example in samples} for samples in trained_on] == [{False}, {True}]


def test_a_bank_is_measured_once_on_people_who_have_no_part_in_it(bench: Bench) -> None:
    users = write_people(bench.folder / "many.json", people(26))
    where = BuildInputs(users, bench.folder / "judged", str(bench.model), bench.folder, embedder=bench.embedder)
    kept, aside = read_inputs(where, CHAT, OPTIONS)
    assert len(aside) == 6
    assert not {person.user_id for person in kept} & {person.user_id for person in aside}
    assert read_inputs(where, CHAT, replace(OPTIONS, verdict=False))[1] == []
    manifest = bench.build("judged", inputs={"users": users})
    assert manifest.training["people"] == 20
    progress = Recorder()
    judged = judge_bank(where, OPTIONS, manifest, progress)
    assert judged == read_manifest(where.out)
    assert judged.verdict
    assert judged.verdict.people == 6
    assert judged.verdict.losses.keys() == {
        name + history for name in ("common", "merged") for history in ("", "+history@h1", "+history@h3")
    }
    assert judged.verdict.merged.low <= judged.verdict.merged.mean <= judged.verdict.merged.high
    assert progress.pieces[-1] == ("measuring on held-out people", 6, 6)
    assert judge_bank(where, OPTIONS, judged, progress) is judged
    assert bench.build("judged", inputs={"users": users}) == judged
    assert "6 people left out" in summarise(where.out)["in_words"]


def test_too_few_people_are_all_in_the_bank_and_it_is_said(bench: Bench, built: BankManifest) -> None:
    where = BuildInputs(bench.users, bench.folder / "plain", str(bench.model), bench.folder)
    progress = Recorder()
    assert judge_bank(where, OPTIONS, built, progress) is built
    assert "too few people" in progress.said[-1]
    assert summarise(where.out)["verdict"] is None
