"""Directions of a bank: with all of them nothing changes, with a few the most is kept, and an anchor can be removed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapters.errors import FusionError
from adapters.fusion import fuse
from adapters.recipe import FusionRecipe, Term, parse_recipe
from bank.building.directions import DirectionRows, make_directions
from bank.building.removal import remove_anchor
from bank.errors import BankError
from bank.lookup.directions import COMPARED, Directions
from bank.lookup.embedder import Embedder
from bank.lookup.index import AnchorIndex
from bank.lookup.serving import ServingBank
from bank.lookup.signature import Curvature, Signature
from bank.lookup.summary import summarise
from bank.manifest import (
    COORDINATES_FILE,
    CURVATURE_FILE,
    MATRIX_FILE,
    ROWS_FILE,
    BankManifest,
    file_sha256,
    read_manifest,
    write_manifest,
)
from bank.matrix import open_anchor_rows, open_matrix
from bank.peft.exported import export_anchor
from bench.rig.tiny import tiny_bank, world
from server.gateway.routes.answering import anchor_answers

N, DECAY, TOKENS = 12, 40.0, 300
NUMBERS = np.random.default_rng(0)
ROOT = NUMBERS.normal(size=(N, N)) * np.exp2(-np.arange(N))  # each direction bends half as much as the one before
H = Curvature.of(ROOT @ ROOT.T)
DEVIATION = float(H.eigenvalues.mean() * DECAY) ** -0.5
ROWS = torch.from_numpy(NUMBERS.normal(size=(N, 500))).bfloat16()
SEEN = Signature("", TOKENS, np.float32(ROOT @ ROOT.T @ NUMBERS.normal(size=N)))


def along(made: DirectionRows, seen: Signature) -> Signature:
    """The signature of the same items along the directions."""
    lead = made.coordinates.astype(np.float64) * DEVIATION
    return Signature("", seen.tokens, np.float32(DEVIATION * (lead.T @ seen.products)))


def step(count: int) -> tuple[DirectionRows, np.ndarray]:
    made = make_directions(H, count, DEVIATION)
    return made, Curvature.of(made.curvature).step(along(made, SEEN), made.rule.decay)


def test_all_directions_give_the_same_weights_as_anchors() -> None:
    made, steps = step(N)
    wanted = H.step(SEEN, DECAY) @ ROWS.float().numpy()
    rows = torch.stack(list(made.mixed(list(ROWS)))).numpy()
    np.testing.assert_allclose(steps @ rows, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    for anchor in range(N):
        np.testing.assert_allclose(made.coordinates[anchor] @ rows, ROWS[anchor].float(), atol=1e-3)


def test_a_few_directions_are_those_that_gain_most() -> None:
    by_count = H.gains(H.step(SEEN, DECAY), SEEN)
    for count in (1, 3, 6):
        made, steps = step(count)
        signature = along(made, SEEN)
        gain = steps @ signature.products - steps @ made.curvature @ steps / 2
        assert gain == pytest.approx(by_count[count - 1], rel=1e-4)
    assert by_count[0] < by_count[2] < by_count[5] < by_count[-1] < 1.01 * by_count[5]


def test_nearest_anchors_are_those_that_change_the_loss_alike() -> None:
    made = make_directions(H, 6, DEVIATION)
    directions = Directions.of(made.coordinates, Curvature.of(made.curvature))
    h = made.coordinates @ made.curvature @ made.coordinates.T
    cosines = h / np.sqrt(np.outer(np.diag(h), np.diag(h)))
    for anchor in range(N):
        found = directions.nearest(-2.5 * made.coordinates[anchor])
        assert [other for other, _ in found] == np.argsort(cosines[anchor])[:3].tolist()
        assert [cosine for _, cosine in found] == pytest.approx(np.sort(-cosines[anchor])[::-1][:3].tolist(), abs=1e-5)
    assert [cosine for _, cosine in directions.nearest(np.zeros(6))] == [0, 0, 0]


def test_the_nearest_anchors_are_found_once_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    searched, search = list[np.ndarray](), AnchorIndex.search
    monkeypatch.setattr(
        AnchorIndex, "search", lambda index, here, k: (searched.append(here), search(index, here, k))[1]
    )
    coordinates = np.random.default_rng(1).normal(size=(1000, 200)).astype(np.float32)
    directions = Directions.of(coordinates, Curvature.of(np.diag(np.arange(200.0, 0.0, -1.0))))
    found = directions.nearest(coordinates[7])
    assert found[0] == (7, pytest.approx(1, abs=1e-6))
    assert directions.nearest(coordinates[7].copy()) == found
    assert [(here.dtype, here.shape) for here in searched] == [(np.float32, (COMPARED,))]
    assert directions.nearest(coordinates[8])[0][0] == 8


@pytest.fixture
def bank(tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path) -> Path:
    return tiny_bank(tmp_path / "bank", tiny_model_folder, embedder_folder, anchors=6, k=2, directions=4)


def opened(bank: Path, embedder: Embedder) -> tuple[ServingBank, BankManifest, np.ndarray]:
    serving = ServingBank.open(bank, embedder.id)
    return serving, serving.manifest, embedder.embed([world(5)])[0]


def test_recipe_has_a_step_per_direction_times_the_strength(bank: Path, embedder: Embedder) -> None:
    serving, manifest, embedding = opened(bank, embedder)
    seen = Signature(manifest.short, 10**6, np.array([3.0, -1.5, 0.01, 0.005], np.float32))
    z = Curvature.of(np.load(bank / "curvature.npy")).step(seen, manifest.weights.posterior.decay)
    for share in (1.0, 0.5):
        found = serving.personalise(embedding, seen, share)
        assert found.source == "signature"
        assert found.recipe.steps == tuple(int(number) for number in np.rint(share * 16 * z))
        assert parse_recipe(found.recipe.name) == found.recipe
        shown = anchor_answers(found.recipe, found.weights)
        assert [(anchor.id, anchor.weight) for anchor in shown] == [("a05", None), ("a03", None), ("a02", None)]
        assert [weight.anchor for weight in found.weights] == [5, 3, 2]  # the directions are 5, 4, 3, 2
    common = serving.personalise(embedding, seen, 0.0)
    assert common.recipe.name == f"mta3:{manifest.short}:shared:c"
    assert anchor_answers(common.recipe, common.weights) == []


def test_by_topics_the_neighbours_coordinates_are_mixed(bank: Path, embedder: Embedder) -> None:
    serving, manifest, embedding = opened(bank, embedder)
    found = serving.personalise(embedding)
    assert (found.source, found.weights[0].anchor) == ("topic", 5)
    assert found.recipe.steps[0] == round(16 * round(found.weights[0].weight, 2))
    merged = fuse(open_matrix(bank, manifest), found.recipe, torch.float32)
    assert merged.rank == manifest.rank


def test_direction_bank_refuses_anchors_and_wrong_step_counts(bank: Path) -> None:
    manifest = read_manifest(bank)
    recipe = FusionRecipe(manifest.short, manifest.method, True, (), steps=(1, 2, 3, 4))
    manifest.check(recipe)
    for terms, steps in (((Term(1, 500),), ()), ((), (1, 2, 3)), ((), (1, 2, 3, 4, 5))):
        with pytest.raises(FusionError, match="has 4 directions, but the recipe is"):
            manifest.check(FusionRecipe(manifest.short, manifest.method, True, terms, steps=steps))
    people = manifest.model_copy(update={"directions": None})
    with pytest.raises(FusionError, match="has anchors and no directions"):
        people.check(recipe)


def test_anchor_is_exported_from_its_row_while_the_file_exists(bank: Path, tmp_path: Path) -> None:
    export_anchor(bank, "a01", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    lora = fuse(
        open_anchor_rows(bank, read_manifest(bank)),
        FusionRecipe("0" * 8, read_manifest(bank).method, False, (Term(1, 1000),)),
    )
    name = next(iter(lora.b))
    assert torch.equal(weights[f"base_model.model.{name}.lora_B.weight"], lora.b[name])
    (bank / ROWS_FILE).unlink()
    summarise(bank)  # is not damaged without them
    with pytest.raises(BankError, match=f"lacks {ROWS_FILE}"):
        export_anchor(bank, "a01", tmp_path / "again")


@pytest.mark.parametrize("directions", [None, 4])
def test_removed_anchor_is_in_no_row_and_others_are_unchanged(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, directions: int | None
) -> None:
    make = {"anchors": 5, "signs": True, "directions": directions}
    bank, out = tiny_bank(tmp_path / "bank", tiny_model_folder, embedder_folder, **make), tmp_path / "out"
    before, after = read_manifest(bank), remove_anchor(bank, "a04", out)
    assert [entry.id for entry in after.anchors] == ["a00", "a01", "a02", "a03"]
    assert after.fingerprint != before.fingerprint
    kept, gone = open_anchor_rows(out, after).rows, open_anchor_rows(bank, before).rows
    assert torch.equal(kept, gone[[0, 1, 2, 3, 5]])
    rows = open_matrix(out, after).rows[:-1].float()
    lost = gone[4].float()
    assert (rows @ lost).abs().max() < 0.2 * rows.norm(dim=1).max() * lost.norm()
    serving = ServingBank.open(out, after.embedder.id)
    assert serving.index.anchor_count == 4
    if directions:  # a04 bends most, so it was the first direction, a01 the last of four
        coordinates = np.load(out / COORDINATES_FILE)
        assert np.abs(coordinates).argmax(axis=0).tolist() == [3, 2, 1, 0][: coordinates.shape[1]]
    for anchor, message in (("a09", "no anchor 'a09'"), ("a04", "already holds a bank")):
        with pytest.raises(BankError, match=message):
            remove_anchor(bank, anchor, tmp_path / "other" if anchor == "a09" else out)
    assert not (tmp_path / "other" / MATRIX_FILE).exists()


def test_a_removal_leaves_the_prior_of_the_other_anchors(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path
) -> None:
    bank = tiny_bank(tmp_path / "bank", tiny_model_folder, embedder_folder, anchors=3, signs=True)
    np.save(bank / CURVATURE_FILE, np.diag([1.0, 1.0, 7.0]))
    before = read_manifest(bank)
    files = before.files | {CURVATURE_FILE: file_sha256(bank / CURVATURE_FILE)}
    write_manifest(bank, before.model_copy(update={"files": files}))
    after = remove_anchor(bank, "a02", tmp_path / "out")
    assert before.weights.posterior and after.weights.posterior
    assert after.weights.posterior.decay == 3 * before.weights.posterior.decay
