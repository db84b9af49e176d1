"""A user's weights, by topics and by signature, and what becomes of them in a recipe; banks that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.lora import ModuleShape
from adapters.recipe import MAX_DIRECTIONS, FusionMethod, parse_recipe
from adapters.training.example import Example
from bank.building import signer
from bank.building.options import BuildOptions
from bank.building.ranks import Ranks
from bank.building.resume import Workbench
from bank.building.rows import RowTrainer
from bank.building.signer import MeasuredPerson, _judge, fit_rule, measure_curvature
from bank.errors import BankError
from bank.items.profile import Vectors
from bank.items.tasks import get_task
from bank.lookup.index import AnchorIndex
from bank.lookup.projection import Projection
from bank.lookup.serving import (
    AnchorWeight,
    ServingBank,
    recipe_of_shares,
    recipe_of_steps,
    topic_weights,
)
from bank.lookup.signature import Curvature, Signature
from bank.manifest import (
    CURVATURE_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MAP_FILE,
    AnchorEntry,
    BankManifest,
    BaseModelId,
    EmbedderId,
    PosteriorRule,
    WeightRule,
    file_sha256,
    write_manifest,
)
from tests.support.bank_bench import Recorder, flip_a_bit

N = 4
QUERY = np.array([1, 0, 0, 0], dtype=np.float32)
SIGNED = WeightRule(anchors=2, strength=0.4, posterior=PosteriorRule(decay=100.0))


def manifest(anchors: int = N, common: bool = False) -> BankManifest:
    return BankManifest(
        task="chat",
        base_model=BaseModelId(name="tiny", hash="0" * 64),
        embedder=EmbedderId(id="e" * 16, dim=4),
        method=FusionMethod.CAT,
        common=common,
        rank=2,
        user_rank=2,
        serving_rank=8,
        weights=WeightRule(anchors=2),
        target_modules=("q_proj",),
        modules=(ModuleShape("q_proj", 4, 4),),
        anchors=tuple(AnchorEntry(id=f"a{i:02d}", items=11) for i in range(anchors)),
        training={},
        files={},
        fingerprint="9f2c41d0" + "0" * 56,
    )


def index_at(*cosines: float) -> AnchorIndex:
    """Anchors at the given cosines to `QUERY`."""
    return AnchorIndex.build(np.array([[c, (1 - c * c) ** 0.5, 0, 0] for c in cosines], dtype=np.float32))


def saved_bank(folder: Path, **changes: object) -> BankManifest:
    index = index_at(0.9, 0.3, -0.2, 0.1)
    index.save(folder / INDEX_FILE)
    Projection.of(index.vectors(range(N))).save(folder / MAP_FILE)
    np.save(folder / CURVATURE_FILE, np.diag([1.0, 2.0, 3.0, 4.0]))
    files = {name: file_sha256(folder / name) for name in (INDEX_FILE, MAP_FILE, CURVATURE_FILE)}
    return write_manifest(folder, manifest().model_copy(update={"files": files, **changes}))


def opened(folder: Path) -> ServingBank:
    return ServingBank.open(folder, "e" * 16)


def signed_bank(folder: Path) -> BankManifest:
    return saved_bank(folder, weights=SIGNED, method=FusionMethod.SHARED, common=True)


@pytest.mark.parametrize(
    ("cosines", "weights", "terms"),
    [
        ((0.3, 0.1, 0.9), {2: 0.75, 0: 0.25}, "a00*250+a02*750"),  # the paper's released merger swaps the two weights
        ((0.5, -0.5), {0: 1.0, 1: 0.0}, "a00*1000"),
        ((-0.5, -0.1, -0.9), {1: 0.5, 0: 0.5}, "a00*500+a01*500"),
    ],
)
def test_weights_are_normalised_similarities_without_negatives(
    cosines: tuple[float, ...], weights: dict[int, float], terms: str
) -> None:
    found = topic_weights(index_at(*cosines), WeightRule(anchors=2), QUERY)
    assert [weight.anchor for weight in found] == list(weights)
    assert [weight.weight for weight in found] == pytest.approx(list(weights.values()), abs=1e-5)
    assert [weight.similarity for weight in found] == pytest.approx([cosines[anchor] for anchor in weights], abs=1e-5)
    assert recipe_of_shares(manifest(), found).name == f"mta3:9f2c41d0:cat:{terms}"


def test_common_row_gets_the_rest_and_steps_are_bounded() -> None:
    weights = topic_weights(index_at(0.6, 0.2), WeightRule(anchors=2, strength=0.4), QUERY)
    for share, terms in ((1, "c+a00*300+a01*100"), (0.5, "c+a00*150+a01*50"), (0, "c")):
        assert recipe_of_shares(manifest(common=True), weights, share).name == f"mta3:9f2c41d0:cat:{terms}"
    assert recipe_of_shares(manifest(common=False), weights, 0.5).name == "mta3:9f2c41d0:cat:a00*750+a01*250"
    steps = [AnchorWeight(anchor, step, 0.0) for anchor, step in ((2, -9.0), (0, 0.5), (1, 0.0004))]
    for share, terms in ((1.0, "c+a00*500+a02*-4000"), (0.5, "c+a00*250+a02*-4000"), (0.0, "c")):
        assert recipe_of_steps(manifest(), steps, share).name == f"mta3:9f2c41d0:cat:{terms}"
    assert manifest().common_recipe.name == "mta3:9f2c41d0:cat:c"


def test_people_of_nearly_the_same_topics_share_a_recipe(tmp_path: Path) -> None:
    saved, other = saved_bank(tmp_path), QUERY + np.array([0, 0.01, 0, 0], np.float32)
    bank = opened(tmp_path)
    by_mille = {recipe_of_shares(saved, topic_weights(bank.index, saved.weights, at)).name for at in (QUERY, other)}
    assert len(by_mille) == 2
    assert bank.personalise(QUERY).recipe == bank.personalise(other).recipe
    assert bank.personalise(QUERY).recipe.name == f"mta3:{saved.short}:cat:a00*750+a01*250"
    assert [weight.anchor for weight in bank.personalise(QUERY).weights] == [0, 1]


def measured(seed: int = 0) -> np.ndarray:
    """A curvature as it is measured: not quite symmetric, positive but for noise."""
    numbers = np.random.default_rng(seed)
    root = numbers.normal(size=(N, N))
    return root @ root.T + 0.01 * numbers.normal(size=(N, N))


@given(seed=st.integers(0, 999), tokens=st.integers(1, 5000), decay=st.floats(1, 1000))
def test_a_step_is_the_posterior_mean(seed: int, tokens: int, decay: float) -> None:
    h = measured(seed)
    x, topics = np.random.default_rng(seed + 1).normal(size=(2, N))
    values, vectors = np.linalg.eigh((h + h.T) / 2)
    h = vectors @ np.diag(np.clip(values, 0, None)) @ vectors.T
    scale = decay * np.trace(h) / N
    wanted = np.linalg.solve(tokens * h + scale * np.eye(N), tokens * x + scale * topics)
    found = Curvature.of(measured(seed)).step(Signature("00000000", tokens, x), decay, topics=topics)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["of many people", "of few people", "the same along all rows", "of rows apart"])
def test_a_row_left_out_is_as_if_the_curvature_lacked_it(kind: str) -> None:
    count, numbers = MAX_DIRECTIONS + 16 if kind == "of many people" else 40, np.random.default_rng(0)
    root = numbers.normal(size=(count, 8 if kind == "of few people" else 2 * count))
    apart = {"the same along all rows": np.eye(count), "of rows apart": np.diag(np.arange(1.0, count + 1))}
    h = apart.get(kind, root @ root.T)
    x, topics = (h @ numbers.normal(size=count)).astype(np.float32), numbers.normal(size=count)
    for own in (0, count // 2, count - 1):
        others = np.arange(count) != own
        known, seen = Curvature.of(h[others][:, others]), Signature("", 1000, x)
        step = Curvature.of(h).step(seen, 250.0, without=own, topics=topics)
        wanted = known.step(replace(seen, products=x[others]), 250.0, topics=topics[others])
        np.testing.assert_allclose(step[others], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        assert step[own] == 0
        gains = Curvature.of(h).gains(step, seen, without=own)
        direct = known.gains(wanted, replace(seen, products=x[others]))
        np.testing.assert_allclose(gains[:-1], direct, rtol=0, atol=1e-5 * direct[-1])
        assert gains[-1] == pytest.approx(direct[-1], rel=1e-5)


def test_the_rule_is_fitted_without_another_eigendecomposition(
    trainer: RowTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bowl: Any = Quadratic()
    people = [replace(bowl.person(np.ones(N)), own_row=own) for own in (None, *range(N))]
    curvature, wants = Curvature.of(bowl.h), replace(trainer, options=BuildOptions("chat", directions=1))
    monkeypatch.delattr(np.linalg, "eigh")
    fit_rule(bowl, curvature, people, wants, Workbench(tmp_path, Ranks()))


def test_a_curvature_that_says_nothing_is_refused() -> None:
    for number, reason in ((0.0, "no positive curvature"), (np.nan, "not finite")):
        with pytest.raises(BankError, match=reason):
            Curvature.of(np.full((N, N), number))


class Quadratic:
    """A signer of people with quadratic losses; an item's token ids are the person's best step in thousandths."""

    tokens = 100  # of an item

    def __init__(self) -> None:
        root = np.random.default_rng(0).normal(size=(N, N + 2))
        self.h, self._chance = root @ root.T / N, np.random.default_rng(1)

    def person(self, best: Vectors, items: int = 12) -> MeasuredPerson:
        item = Example(tuple(np.round(best * 1000).astype(int)), len(best) - self.tokens)
        return MeasuredPerson("", None, [item] * items)

    def drawn_products(self, examples: Sequence[Example], seed: int) -> Vectors:
        chance = np.random.default_rng(seed)
        return chance.multivariate_normal(np.zeros(N), self.tokens * self.h, len(examples))

    def signature(self, bank: str, examples: Sequence[Example]) -> Signature:
        tokens, best = self.tokens * len(examples), np.array(examples[0].ids) / 1000
        noise = self._chance.multivariate_normal(np.zeros(N), self.h / tokens)
        return Signature(bank, tokens, self.h @ best + noise)

    def losses(self, steps: Vectors, examples: Sequence[Example]) -> Vectors:
        away = steps - np.array(examples[0].ids) / 1000
        return np.einsum("si,ij,sj->s", away, self.h, away) / 2


@pytest.fixture
def trainer() -> RowTrainer:
    return RowTrainer(None, None, get_task("chat"), BuildOptions("chat"), Recorder())


@pytest.mark.parametrize("far", [0.3, 0.03])
def test_curvature_and_decay_are_fitted_near_the_true_values(
    far: float, trainer: RowTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signer, "JUDGES", 300)
    quadratic: Any = Quadratic()
    people = [quadratic.person(best) for best in np.random.default_rng(2).normal(size=(300, N)) * far]
    work = Workbench(tmp_path, Ranks())
    h = measure_curvature(quadratic, people, trainer, work)
    assert np.linalg.norm(h - quadratic.h) < 0.1 * np.linalg.norm(quadratic.h)
    decay, _ = fit_rule(quadratic, Curvature.of(h), people, trainer, work)
    best = N / (far**2 * np.trace(h))  # the noise of one token over the variance of people's steps
    assert best / 4 < decay < best * 4


def test_decay_ignores_own_row_and_bank_of_one_keeps_default(trainer: RowTrainer, tmp_path: Path) -> None:
    bowl: Any = Quadratic()
    person = bowl.person(np.array([5.0, 0.0, 0.0, 0.0]))
    anchor = replace(person, own_row=0)
    before = bowl.losses(np.zeros((1, N)), person.examples)[0]
    losses = [before - _judge(bowl, Curvature.of(bowl.h), who, directions=False).max() for who in (anchor, person)]
    assert losses[0] > 10 * losses[1]
    assert fit_rule(bowl, Curvature.of(np.ones((1, 1))), [anchor], trainer, Workbench(tmp_path, Ranks())) == (
        PosteriorRule().decay,
        1,
    )


@pytest.mark.parametrize("own_row", [None, 0])
def test_gain_kept_by_the_leading_directions_is_predicted(
    own_row: int | None, trainer: RowTrainer, tmp_path: Path
) -> None:
    bowl: Any = Quadratic()
    bowl.h = np.diag([0.001, 1.0, 0.0005, 0.5])
    people = [replace(bowl.person(np.array([1.0, 1.0, 1.0, far])), own_row=own_row) for far in (1.0, 1.1, 0.9)]
    wants = replace(trainer, options=BuildOptions("chat", directions=1))
    _, kept = fit_rule(bowl, Curvature.of(bowl.h), people, wants, Workbench(tmp_path, Ranks()))
    assert kept == pytest.approx([2 / 3, 1, 1, 1], abs=0.05)


def test_evidence_leads_to_steps_and_topics_to_coarse_shares(tmp_path: Path) -> None:
    written, bank = signed_bank(tmp_path), opened(tmp_path)
    found = bank.personalise(QUERY, Signature(written.short, 10**6, np.array([1.0, -1.0, 0.5, 0.1], np.float32)))
    assert found.source == "signature"
    assert found.recipe.name == f"mta3:{written.short}:shared:c+a00*1000+a01*-500+a02*167+a03*25"
    assert [weight.anchor for weight in found.weights] == [0, 1, 2, 3]
    assert found.weights[1].gain == -1.0
    assert parse_recipe(found.recipe.name) == found.recipe
    topic = bank.personalise(QUERY)
    assert (topic.source, topic.recipe.name) == ("topic", f"mta3:{written.short}:shared:c+a00*300+a01*100")
    assert bank.personalise(QUERY, Signature("00000000", 9, np.ones(N, np.float32))) == topic


def test_the_first_items_move_a_user_on_from_their_topics(tmp_path: Path) -> None:
    written, bank = signed_bank(tmp_path), opened(tmp_path)
    products = np.array([1.0, -1.0, 0.5, 0.1], np.float32)
    weights = [bank.personalise(QUERY, Signature(written.short, n, products)).weights for n in (1, 10**7)]
    few, many = ({each.anchor: each.weight for each in found} for found in weights)
    assert [few[0], few[1], few[2]] == pytest.approx([0.3, 0.1, 0.0], abs=0.02)
    assert [many[0], many[1], many[2]] == pytest.approx([1.0, -0.5, 0.167], abs=0.01)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_signature_with_a_non_finite_number_is_ignored(tmp_path: Path, number: float) -> None:
    written, bank = signed_bank(tmp_path), opened(tmp_path)
    products = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    assert bank.personalise(QUERY, Signature(written.short, 9, products)).source == "signature"
    products[2] = number
    assert bank.personalise(QUERY, Signature(written.short, 9, products)) == bank.personalise(QUERY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedder": EmbedderId(id="f" * 16, dim=4)}, "made with embedder ffff"),
        ({"anchors": (AnchorEntry(id="a00", items=11),)}, "holds 4 anchors"),
        ({"task": "poems"}, "unknown task 'poems'"),
        ({"format": 3}, "has format 3, which is not supported: build it again with `mta bank build`"),
        *((file, "damaged") for file in (INDEX_FILE, MAP_FILE, CURVATURE_FILE)),
    ],
)
def test_mismatched_older_or_damaged_bank_is_refused(
    tmp_path: Path, changes: dict[str, object] | str, message: str
) -> None:
    if isinstance(changes, str):
        signed_bank(tmp_path)
        flip_a_bit(tmp_path / changes)
    else:
        saved_bank(tmp_path, **changes)
    with pytest.raises(BankError, match=message):
        opened(tmp_path)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    signed_bank(tmp_path)
    (tmp_path / MAP_FILE).unlink()
    (tmp_path / MAP_FILE).mkdir()
    with pytest.raises(BankError, match=r"cannot read .*map.json: Is a directory"):
        opened(tmp_path)


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    saved_bank(tmp_path)
    manifest = tmp_path / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"a00"', '"a01"', 1))
    with pytest.raises(BankError, match="does not match its fingerprint"):
        opened(tmp_path)
