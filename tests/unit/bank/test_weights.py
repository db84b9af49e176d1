"""Anchor weights: the nearest speaks loudest, and rounding keeps the sum."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.recipe import FusionMethod, parse_recipe
from bank.errors import BankError
from bank.lookup.index import AnchorIndex
from bank.lookup.serving import ServingBank
from bank.lookup.signature import Signature
from bank.lookup.weights import AnchorWeight, evident_weights, make_recipe, topic_weights
from bank.manifest import (
    INDEX_FILE,
    AnchorEntry,
    BankManifest,
    BaseModelId,
    EmbedderId,
    ModuleEntry,
    file_sha256,
    write_manifest,
)
from bank.rules import SignatureRule, WeightRule
from server.store.profile_record import decode_profile, encode_profile
from server.store.profiles import Profile, StoredSignature


def manifest(anchors: int = 4, common: bool = False, strength: float = 1.0, k: int = 2) -> BankManifest:
    return BankManifest(
        task="chat",
        base_model=BaseModelId(name="tiny", hash="0" * 64),
        embedder=EmbedderId(id="e" * 16, dim=4),
        method=FusionMethod.CAT,
        common=common,
        rank=2,
        user_rank=2,
        serving_rank=8,
        weights=WeightRule(anchors=k, strength=strength),
        target_modules=("q_proj",),
        modules=(ModuleEntry(name="q_proj", h_in=4, h_out=4),),
        anchors=tuple(AnchorEntry(id=f"a{i:02d}", items=11) for i in range(anchors)),
        training={},
        files={},
        fingerprint="9f2c41d0" + "0" * 56,
    )


def index_at(*cosines: float) -> tuple[AnchorIndex, np.ndarray]:
    """Anchors at the given cosines to the query that comes with them."""
    rows = np.array([[c, (1 - c * c) ** 0.5, 0, 0] for c in cosines], dtype=np.float32)
    return AnchorIndex.build(rows), np.array([1, 0, 0, 0], dtype=np.float32)


def test_weights_are_similarities_over_their_sum_and_are_never_swapped() -> None:
    """Two anchors of unequal similarity: the released merger of the paper gives each the other's weight."""
    index, query = index_at(0.3, 0.1, 0.9)
    near, far = topic_weights(index, WeightRule(anchors=2), query)
    assert (near.anchor, far.anchor) == (2, 0)
    assert near.weight == pytest.approx(0.75, abs=1e-5)
    assert far.weight == pytest.approx(0.25, abs=1e-5)
    assert near.similarity == pytest.approx(0.9, abs=1e-5)
    recipe = make_recipe(manifest(), (near, far))
    assert recipe.name == "mta1:9f2c41d0:cat:a00*250+a02*750"


def test_a_negative_similarity_counts_as_nothing() -> None:
    index, query = index_at(0.5, -0.5)
    weights = topic_weights(index, WeightRule(anchors=2), query)
    assert [w.weight for w in weights] == [1.0, 0.0]
    assert make_recipe(manifest(), weights).name == "mta1:9f2c41d0:cat:a00*1000"


def test_when_nothing_is_similar_the_weights_are_equal() -> None:
    index, query = index_at(-0.5, -0.1, -0.9)
    weights = topic_weights(index, WeightRule(anchors=2), query)
    assert [(w.anchor, w.weight) for w in weights] == [(1, 0.5), (0, 0.5)]


def test_strength_leaves_the_rest_to_the_common_row() -> None:
    index, query = index_at(0.6, 0.2)
    weights = topic_weights(index, WeightRule(anchors=2, strength=0.4), query)
    assert sum(w.weight for w in weights) == pytest.approx(0.4)
    assert make_recipe(manifest(common=True, strength=0.4), weights).name == "mta1:9f2c41d0:cat:c+a00*300+a01*100"


@pytest.mark.parametrize(
    ("common", "share", "terms"),
    [(True, 1, "c+a00*300+a01*100"), (True, 0.5, "c+a00*150+a01*50"), (True, 0, "c"), (False, 0.5, "a00*750+a01*250")],
)
def test_of_a_share_the_common_row_has_the_rest(common: bool, share: float, terms: str) -> None:
    weights = [AnchorWeight(0, 0.3, 0.9), AnchorWeight(1, 0.1, 0.3)]
    assert make_recipe(manifest(common=common), weights, share).name == f"mta1:9f2c41d0:cat:{terms}"


@given(
    st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=1, max_size=6).filter(any),
    st.booleans(),
    st.integers(1, 1000),
)
def test_a_recipe_sums_to_the_strength_and_is_canonical(shares: list[float], common: bool, mille: int) -> None:
    strength = mille / 1000
    weights = [AnchorWeight(i, strength * share / sum(shares), share) for i, share in enumerate(shares)][::-1]
    recipe = make_recipe(manifest(6, common, strength), weights)
    assert parse_recipe(recipe.name) == recipe
    assert sum(term.weight for term in recipe.terms) == (mille if common else 1000)
    by_anchor = {term.anchor: term.weight for term in recipe.terms}
    for a, b in itertools.pairwise(weights):
        if a.weight > b.weight:
            assert by_anchor.get(a.anchor, 0) >= by_anchor.get(b.anchor, 0)


def test_people_of_nearly_the_same_topics_share_a_recipe(tmp_path: Path) -> None:
    saved = saved_bank(tmp_path)
    bank = ServingBank.open(tmp_path, saved.embedder.id)
    _, one = index_at(0.9, 0.3, -0.2, 0.1)
    other = one + np.array([0, 0.01, 0, 0], np.float32)
    by_mille = {make_recipe(saved, topic_weights(bank.index, saved.weights, at)).name for at in (one, other)}
    assert len(by_mille) == 2
    assert bank.personalise(one).recipe == bank.personalise(other).recipe
    assert [term.weight for term in bank.personalise(one).recipe.terms] == [750, 250]


def damage(path: Path) -> None:
    """Flip a bit of a file's last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def saved_bank(folder: Path, **changes: object) -> BankManifest:
    index, _ = index_at(0.9, 0.3, -0.2, 0.1)
    index.save(folder / INDEX_FILE)
    files = {INDEX_FILE: file_sha256(folder / INDEX_FILE)}
    return write_manifest(folder, manifest().model_copy(update={"files": files, **changes}))


def test_evidence_is_a_softmax_of_gains_by_the_root_of_the_tokens_and_of_topics() -> None:
    rule = SignatureRule(anchors=3, strength=0.5, tau=2.0, kappa=1.5)
    gains, cosines = np.array([0.1, -0.2, 0.05, 0.0]), np.array([0.0, 0.9, 0.4, -0.1])
    found = evident_weights(rule, range(4), gains, cosines, tokens=100)
    scores = np.exp(2.0 * 10.0 * gains + 1.5 * cosines)
    best = [0, 2, 3]
    assert [w.anchor for w in found] == best
    assert [w.weight for w in found] == pytest.approx([0.5 * scores[i] / scores[best].sum() for i in best])
    assert [(w.similarity, w.gain) for w in found] == [(cosines[i], gains[i]) for i in best]


def test_without_any_tokens_of_evidence_all_anchors_weigh_alike() -> None:
    found = evident_weights(SignatureRule(anchors=4, kappa=0.0), range(4), np.array([3.0, 0, 0, 0]), np.ones(4), 0)
    assert [w.weight for w in found] == [0.25] * 4


def test_a_serving_bank_leads_from_an_embedding_to_a_recipe(tmp_path: Path) -> None:
    written = saved_bank(tmp_path)
    bank = ServingBank.open(tmp_path, "e" * 16)
    found = bank.personalise(np.array([1, 0, 0, 0], dtype=np.float32))
    recipe, weights = found.recipe, found.weights
    assert recipe.name == f"mta1:{written.short}:cat:a00*750+a01*250"
    assert [w.anchor for w in weights] == [0, 1]
    assert bank.task.name == "chat"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy says so when the record is written
def test_a_signature_that_holds_what_is_no_number_is_as_good_as_none(tmp_path: Path, number: float) -> None:
    rule = SignatureRule(anchors=2, offsets=(0.0,) * 4)
    written = saved_bank(tmp_path, weights=WeightRule(anchors=2, signature=rule))
    bank, embedding = ServingBank.open(tmp_path, "e" * 16), np.array([1, 0, 0, 0], dtype=np.float32)
    products = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    assert bank.personalise(embedding, Signature(written.short, 9, products)).source == "signature"
    products[2] = number
    spoiled = StoredSignature(Signature(written.short, 9, products), 1)
    profile = decode_profile(encode_profile(Profile("ada", 1, 1, "e" * 16, embedding, signature=spoiled)))
    for signature in (spoiled.signature, profile.evidence):
        assert bank.personalise(embedding, signature) == bank.personalise(embedding)


def test_a_bank_of_another_embedder_is_refused(tmp_path: Path) -> None:
    saved_bank(tmp_path)
    with pytest.raises(BankError, match="made with embedder eeee"):
        ServingBank.open(tmp_path, "f" * 16)


def test_a_bank_with_a_flipped_byte_in_its_index_is_refused(tmp_path: Path) -> None:
    saved_bank(tmp_path)
    damage(tmp_path / INDEX_FILE)
    with pytest.raises(BankError, match="damaged"):
        ServingBank.open(tmp_path, "e" * 16)


def test_an_index_of_another_size_than_the_manifest_is_refused(tmp_path: Path) -> None:
    saved_bank(tmp_path, anchors=(AnchorEntry(id="a00", items=11),))
    with pytest.raises(BankError, match="holds 4 anchors"):
        ServingBank.open(tmp_path, "e" * 16)


def test_a_bank_for_a_task_that_is_not_known_is_refused(tmp_path: Path) -> None:
    saved_bank(tmp_path, task="poems")
    with pytest.raises(BankError, match="unknown task 'poems'"):
        ServingBank.open(tmp_path, "e" * 16)
