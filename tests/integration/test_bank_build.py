"""`mta bank build` on a tiny model: real training, real kills, real files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from adapters.fusion import fuse
from adapters.recipe import FusionMethod, FusionRecipe, Term
from bank.building.resume import WORK_FOLDER
from bank.errors import BankError
from bank.items.histories import read_histories
from bank.items.prompt import encode_pair
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.manifest import BankManifest, read_manifest
from bank.models.load import load_base
from bench.rig.people import people, write_people
from tests.support.bank_bench import OPTIONS, Bench, Recorder


def test_a_bank_has_exactly_the_anchors_asked_for_with_the_longest_histories(built: BankManifest) -> None:
    assert [entry.id for entry in built.anchors] == ["a00", "a01", "a02"]
    assert built.anchors[-1].items == 18


def test_the_same_seed_gives_the_same_bank_and_another_seed_another(bench: Bench, built: BankManifest) -> None:
    assert bench.build("again").fingerprint == built.fingerprint
    assert bench.build("other-seed", seed=1).fingerprint != built.fingerprint


def test_every_option_is_in_the_manifest_and_no_name_or_text_of_anybody_in_the_artifact(
    bench: Bench, built: BankManifest
) -> None:
    assert built.training.items() >= (dataclasses.asdict(OPTIONS) | {"people": 5}).items()
    content = b"".join(path.read_bytes() for path in (bench.folder / "plain").rglob("*"))
    assert not any(word in content for word in (b"secret-person", b"surfing"))


def test_typical_words_of_anchors_are_kept_on_request_alone(bench: Bench, built: BankManifest) -> None:
    assert not any(anchor.words for anchor in built.anchors)
    described = bench.build("described", describe=True)
    assert any(anchor.words for anchor in described.anchors)
    assert read_manifest(bench.folder / "described") == described


def test_the_common_row_is_trained_first_and_the_work_folder_is_gone_after(bench: Bench) -> None:
    progress = Recorder()
    bench.build("order", progress, seed=2)
    assert progress.begun == ["common", "a00", "a01", "a02"]
    assert progress.steps == [(row, step) for row in progress.begun for step in (1, 2, 3)]
    assert progress.pieces == [("measuring", anchor, 3) for anchor in range(4)]
    assert not (bench.folder / "order" / WORK_FOLDER).exists()


def test_a_shared_bank_has_one_a_and_rows_that_are_b_alone(bench: Bench, built: BankManifest) -> None:
    matrix = bench.matrix("plain", built)
    assert matrix.shared_a is not None
    assert matrix.rows.shape == (4, built.layout.b_numbers)
    assert all(matrix.rows[i].abs().sum() > 0 for i in range(4))
    anchor = fuse(matrix, FusionRecipe(built.short, FusionMethod.SHARED, False, (Term(0, 1000),)))
    both = fuse(matrix, FusionRecipe(built.short, FusionMethod.SHARED, True, (Term(0, 1000),)))
    for name in anchor.a:
        assert torch.equal(anchor.a[name], both.a[name])


def test_an_anchor_explains_its_person_better_than_the_common_row_alone(bench: Bench, tiny_model_folder: Path) -> None:
    """The dense sum of base, common row and anchor, as a recipe of that anchor is served."""
    manifest = bench.build("better", anchors=5, steps=40)
    matrix = bench.matrix("better", manifest)
    model, tokenizer = load_base(tiny_model_folder, "float32")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss(terms: tuple[Term, ...], index: int) -> float:
        lora = fuse(matrix, FusionRecipe(manifest.short, FusionMethod.SHARED, True, terms), torch.float32)
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


def test_people_left_out_shape_nothing(bench: Bench, tmp_path: Path) -> None:
    """Leaving two out is the same bank as a file without them."""
    exclude = write_people(tmp_path / "exclude.json", ["secret-person-1", "secret-person-4"])
    without = write_people(tmp_path / "without.json", [p for i, p in enumerate(people(5)) if i not in (1, 4)])
    excluded = bench.build("excluded", inputs={"exclude": exclude})
    assert excluded.fingerprint == bench.build("without", inputs={"users": without}).fingerprint
    assert [entry.items for entry in excluded.anchors] == [14, 16, 17]


def test_too_few_candidates_is_an_error_with_both_numbers(bench: Bench, tmp_path: Path) -> None:
    of_ten = {**people(1, items=10)[0], "user_id": "of ten items"}
    short = write_people(tmp_path / "short.json", [*people(2), of_ten])
    with pytest.raises(BankError, match="3 anchors were asked for, but only 2 people"):
        bench.build("few", inputs={"users": short})
    assert not (bench.folder / "few").exists()


def test_only_the_target_modules_are_adapted(bench: Bench) -> None:
    manifest = bench.build("targets", target_modules=("q_proj", "v_proj"))
    assert manifest.target_modules == ("q_proj", "v_proj")
    assert len(manifest.modules) == 4
    with pytest.raises(BankError, match=r"--target-modules: .*query"):
        bench.build("no-targets", target_modules=("query",))


def test_a_user_is_led_to_the_anchor_who_talks_of_the_same(
    bench: Bench, built: BankManifest, embedder_folder: Path
) -> None:
    embedder = Embedder.load(embedder_folder)
    bank = ServingBank.open(bench.folder / "plain", embedder.id)
    found = bank.personalise(embedder.embed(["Say 99 on baking bread"])[0])
    assert found.weights[0].similarity == max(weight.similarity for weight in found.weights) > 0.5
    assert found.recipe.common
    assert sum(term.weight for term in found.recipe.terms) == 500
