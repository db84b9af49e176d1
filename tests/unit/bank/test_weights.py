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
from bank.lookup.atlas import Atlas
from bank.lookup.index import AnchorIndex
from bank.lookup.serving import AnchorWeight, ServingBank, recipe_of_shares, topic_weights
from bank.lookup.signature import Signature
from bank.manifest import (
    CURVATURE_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MAP_FILE,
    AnchorEntry,
    BankManifest,
    BaseModelId,
    EmbedderId,
    ModuleEntry,
    PosteriorRule,
    WeightRule,
    file_sha256,
    write_manifest,
)
from server.store.profile_record import Profile, StoredSignature, decode_profile, encode_profile


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
    recipe = recipe_of_shares(manifest(), (near, far))
    assert recipe.name == "mta3:9f2c41d0:cat:a00*250+a02*750"


@pytest.mark.parametrize(
    ("cosines", "weights", "terms"),
    [((0.5, -0.5), {0: 1.0, 1: 0.0}, "a00*1000"), ((-0.5, -0.1, -0.9), {1: 0.5, 0: 0.5}, "a00*500+a01*500")],
)
def test_a_negative_similarity_counts_as_nothing_and_where_all_are_the_weights_are_equal(
    cosines: tuple[float, ...], weights: dict[int, float], terms: str
) -> None:
    index, query = index_at(*cosines)
    found = topic_weights(index, WeightRule(anchors=2), query)
    assert {weight.anchor: weight.weight for weight in found} == weights
    assert recipe_of_shares(manifest(), found).name == f"mta3:9f2c41d0:cat:{terms}"


@pytest.mark.parametrize(
    ("common", "share", "terms"),
    [(True, 1, "c+a00*300+a01*100"), (True, 0.5, "c+a00*150+a01*50"), (True, 0, "c"), (False, 0.5, "a00*750+a01*250")],
)
def test_of_strength_and_share_the_common_row_has_the_rest(common: bool, share: float, terms: str) -> None:
    index, query = index_at(0.6, 0.2)
    weights = topic_weights(index, WeightRule(anchors=2, strength=0.4), query)
    assert recipe_of_shares(manifest(common=common), weights, share).name == f"mta3:9f2c41d0:cat:{terms}"


@given(
    st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=1, max_size=6).filter(any),
    st.booleans(),
    st.integers(1, 1000),
)
def test_a_recipe_sums_to_the_strength_and_is_canonical(shares: list[float], common: bool, mille: int) -> None:
    strength = mille / 1000
    weights = [AnchorWeight(i, strength * share / sum(shares), share) for i, share in enumerate(shares)][::-1]
    recipe = recipe_of_shares(manifest(6, common, strength), weights)
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
    by_mille = {recipe_of_shares(saved, topic_weights(bank.index, saved.weights, at)).name for at in (one, other)}
    assert len(by_mille) == 2
    assert bank.personalise(one).recipe == bank.personalise(other).recipe
    assert [term.weight for term in bank.personalise(one).recipe.terms] == [750, 250]


def saved_bank(folder: Path, **changes: object) -> BankManifest:
    index, _ = index_at(0.9, 0.3, -0.2, 0.1)
    index.save(folder / INDEX_FILE)
    Atlas.of(index.vectors(range(4))).save(folder / MAP_FILE)
    np.save(folder / CURVATURE_FILE, np.diag([1.0, 2.0, 3.0, 4.0]))
    files = {name: file_sha256(folder / name) for name in (INDEX_FILE, MAP_FILE, CURVATURE_FILE)}
    return write_manifest(folder, manifest().model_copy(update={"files": files, **changes}))


def test_a_serving_bank_leads_from_an_embedding_to_a_recipe(tmp_path: Path) -> None:
    written = saved_bank(tmp_path)
    bank = ServingBank.open(tmp_path, "e" * 16)
    found = bank.personalise(np.array([1, 0, 0, 0], dtype=np.float32))
    assert found.recipe.name == f"mta3:{written.short}:cat:a00*750+a01*250"
    assert [weight.anchor for weight in found.weights] == [0, 1]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy says so when the record is written
def test_a_signature_that_holds_what_is_no_number_is_as_good_as_none(tmp_path: Path, number: float) -> None:
    written = saved_bank(tmp_path, weights=WeightRule(anchors=2, posterior=PosteriorRule()), common=True)
    bank, embedding = ServingBank.open(tmp_path, "e" * 16), np.array([1, 0, 0, 0], dtype=np.float32)
    products = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    assert bank.personalise(embedding, Signature(written.short, 9, products)).source == "signature"
    products[2] = number
    spoiled = StoredSignature(Signature(written.short, 9, products), 1)
    profile = decode_profile(encode_profile(Profile("ada", 1, 1, "e" * 16, embedding, signature=spoiled)))
    for signature in (spoiled.signature, profile.evidence):
        assert bank.personalise(embedding, signature) == bank.personalise(embedding)


def test_a_bank_of_before_is_refused_with_the_words_to_build_it_again(tmp_path: Path) -> None:
    saved_bank(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_text(path.read_text("utf-8").replace('"format": 4', '"format": 3'), "utf-8")
    with pytest.raises(BankError, match=r"has format 3, which is not supported: build it again with `mta bank build`"):
        ServingBank.open(tmp_path, "e" * 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedder": EmbedderId(id="f" * 16, dim=4)}, "made with embedder ffff"),
        ({"anchors": (AnchorEntry(id="a00", items=11),)}, "holds 4 anchors"),
        ({"task": "poems"}, "unknown task 'poems'"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    saved_bank(tmp_path, **changes)
    with pytest.raises(BankError, match=message):
        ServingBank.open(tmp_path, "e" * 16)


@pytest.mark.parametrize("file", [INDEX_FILE, MAP_FILE, CURVATURE_FILE])
def test_a_bank_with_a_flipped_byte_in_a_file_of_its_lookups_is_refused(tmp_path: Path, file: str) -> None:
    saved_bank(tmp_path, weights=WeightRule(posterior=PosteriorRule()))
    content = bytearray((tmp_path / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BankError, match="damaged"):
        ServingBank.open(tmp_path, "e" * 16)
