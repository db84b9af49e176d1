"""What is kept: profiles as bytes, job ids and adapt configurations as text; nothing of a newer one is dropped."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adapters.errors import TrainingError
from adapters.training.adapt_config import AdaptConfig
from bank.lookup.signature import Signature
from server.store.jobs import JobId, parse_job_id
from server.store.profile_record import (
    AdapterNote,
    OtherEmbedding,
    Profile,
    StoredItem,
    StoredSignature,
    StoredVector,
    as_stored,
    decode_item,
    decode_profile,
    decode_vector,
    encode_item,
    encode_profile,
    encode_vector,
)
from server.store.samples import decode_config, encode_config

DIM = 384
EMBEDDERS = st.binary(min_size=8, max_size=8).map(bytes.hex)
VECTORS = arrays(np.float32, DIM, elements=st.floats(-1, 1, width=32))
IDS = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=26, max_size=26)
TEXTS = st.text(st.characters(codec="utf-8"))


def profile(**changes: object) -> Profile:
    values = {"user_id": "ada", "items": 3, "updated_ms": 1, "embedder": "00" * 8, "embedding": np.ones(DIM, "f4")}
    return Profile(**(values | changes))


@settings(max_examples=30)
@given(
    st.builds(
        Profile,
        user_id=TEXTS.filter(lambda text: len(text.encode()) <= 256),
        items=st.integers(0, 512),
        updated_ms=st.integers(0, 1 << 50),
        embedder=EMBEDDERS,
        embedding=VECTORS.map(as_stored),
        adapter=st.none()
        | st.builds(
            AdapterNote,
            id=IDS,
            recipe=st.text("mta3:c+a0123456789*", min_size=1),
            size_bytes=st.integers(0, 1 << 30),
            created_ms=st.integers(0, 1 << 50),
            made_in=st.sampled_from(("", f"00-{1:032x}-{2:016x}-01")),
        ),
        extra=st.dictionaries(st.integers(10, 255), st.binary(max_size=2000), max_size=3),
    )
)
def test_a_record_survives_the_round_trip_with_parts_that_it_does_not_know(written: Profile) -> None:
    read = decode_profile(encode_profile(written))
    assert np.array_equal(read.embedding, written.embedding)
    assert replace(read, embedding=written.embedding) == written


@pytest.mark.parametrize(("numbers", "scale"), [(0, 1e-4), (1, 1e-4), (12, 1e-4), (12, 1e30)])
def test_a_signature_survives_the_round_trip(numbers: int, scale: float) -> None:
    products = np.random.default_rng(0).standard_normal(numbers).astype("f4") * np.float32(scale)
    written = StoredSignature(Signature("9f2c41d0", 184, products), made_of_ms=1_700_000_000_000)
    read = decode_profile(encode_profile(profile(signature=written))).signature
    assert (read.signature.bank, read.signature.tokens, read.made_of_ms) == ("9f2c41d0", 184, 1_700_000_000_000)
    assert read.signature.products == pytest.approx(products, rel=1e-2, abs=1e-3 * scale)


@pytest.mark.parametrize("wrong", [(1, np.nan), (1, np.inf), (1, -np.inf), (3e38, 3e38)])
def test_a_signature_without_a_finite_length_written_or_kept_says_nothing(wrong: tuple[float, float]) -> None:
    written = StoredSignature(Signature("9f2c41d0", 184, np.array(wrong, np.float32)), made_of_ms=7)
    kept = struct.pack("<4sIQf2e", bytes.fromhex("9f2c41d0"), 184, 7, np.nan, np.nan, np.nan)
    for record in (profile(signature=written), profile(extra={8: kept})):
        read = decode_profile(encode_profile(record)).signature
        assert (read.signature.bank, read.signature.tokens, read.made_of_ms) == ("9f2c41d0", 0, 7)
        assert read.signature.products.tolist() == [0, 0]


@pytest.mark.parametrize(("tag", "cut"), [(8, bytes(21)), (9, bytes(17))], ids=["signature", "second embedding"])
def test_a_damaged_part_is_refused_as_part_of_the_record(tag: int, cut: bytes) -> None:
    for damaged in (b"", b"short", cut):
        with pytest.raises(ValueError, match="profile record"):
            decode_profile(encode_profile(profile(extra={tag: damaged})))


def test_a_profile_is_seen_by_both_embedders_while_the_items_are_the_same() -> None:
    mine, theirs = (np.eye(DIM, dtype="f4")[place] for place in (0, 1))
    both = profile(embedding=mine, other=OtherEmbedding("22" * 8, theirs, profile().updated_ms))
    read = decode_profile(encode_profile(both))
    for embedder, embedding in ((both.embedder, mine), ("22" * 8, theirs)):
        seen = read.with_embedder(embedder)
        assert (seen.embedder, seen.embedding.tolist()) == (embedder, embedding.tolist())
        back = seen.with_embedder(both.embedder)
        assert back.embedding.tolist() == mine.tolist()
    assert read.with_embedder("11" * 8) is None
    assert replace(read, updated_ms=read.updated_ms + 1).with_embedder("22" * 8) is None


def test_a_record_cut_anywhere_or_of_another_version_is_refused() -> None:
    record = encode_profile(profile())
    assert record != encode_profile(profile())
    for cut in range(len(record)):
        with pytest.raises(ValueError, match="profile record"):
            decode_profile(record[:cut])
    with pytest.raises(ValueError, match="version"):
        decode_profile(b"\x09" + record[1:])


@given(st.integers(0, 1 << 40), st.dictionaries(TEXTS, TEXTS))
def test_an_item_survives_the_round_trip(order: int, fields: dict[str, str]) -> None:
    assert decode_item(encode_item(StoredItem(order, fields))) == StoredItem(order, fields)


@given(EMBEDDERS, VECTORS)
def test_a_vector_survives_the_round_trip(embedder: str, vector: np.ndarray) -> None:
    read = decode_vector(encode_vector(StoredVector(embedder, vector)))
    assert read.embedder == embedder
    assert np.array_equal(read.vector, as_stored(vector))
    assert read.vector.dtype == np.float32
    assert read.vector == pytest.approx(vector, abs=1e-3)


USER = "axi2q2svfyrolurh6ecirfzy3m"
OLD = '{"rank":2,"steps":16,"learning_rate":0.02,"holdout":0.2,"strength":1.0,"seed":0}'


@pytest.mark.parametrize("number", [1, 10, 9_999_999_999])
def test_a_job_id_comes_back_from_its_text(number: int) -> None:
    assert parse_job_id(f"{USER}.{number}") == JobId(USER, number)
    assert str(JobId(USER, number)) == f"{USER}.{number}"


@pytest.mark.parametrize("text", ["", "a", "a.", ".1", "a.01", "a.-1", "a.1.2", "a.x", "a/b.1", "a.²"])
def test_any_other_text_is_refused(text: str) -> None:
    assert parse_job_id(text) is None
    assert parse_job_id(text.replace("a", USER, 1)) is None


def test_a_configuration_comes_back_as_it_was_and_one_of_an_earlier_gateway_gets_the_usual_budget() -> None:
    config = AdaptConfig(rank=1, steps=3, max_tokens=1000, max_seconds=60)
    assert decode_config(encode_config(config)) == config
    old, usual = decode_config(OLD), AdaptConfig()
    assert (old.steps, old.learning_rate) == (16, 0.02)
    assert (old.max_tokens, old.max_seconds) == (usual.max_tokens, usual.max_seconds)


@pytest.mark.parametrize(
    ("text", "shown"),
    [(OLD.replace('"seed"', '"optimizer":"sgd","seed"'), "'optimizer'"), ("[1]", "[1]"), ("{", ""), ("", "")],
)
def test_what_this_version_does_not_know_is_named(text: str, shown: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode_config(text)
    assert shown in str(caught.value)


WRONG = [("steps", 0), ("learning_rate", "fast"), ("learning_rate", 0), ("rank", "2"), ("rank", 0), ("holdout", 1)]


@pytest.mark.parametrize(("field", "value"), [*WRONG, ("seed", None)])
def test_a_value_that_nothing_can_be_trained_with_is_named(field: str, value: object) -> None:
    with pytest.raises(TrainingError, match=field):
        decode_config(json.dumps(json.loads(OLD) | {field: value}))
