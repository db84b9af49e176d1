"""What is kept of users: their keys, profiles as bytes, job ids and adapt configurations; nothing newer is dropped."""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import replace
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import MtaError, TrainingError
from adapters.recipe import FusionMethod, FusionRecipe, UserAdapterId, parse_recipe
from adapters.training.adapt_config import AdaptConfig
from bank.lookup.phrases import phrase_table
from bank.lookup.signature import Signature
from server.store import profile_record as records
from server.store.jobs import JobId, parse_job_id
from server.store.profile_record import AdapterNote, OtherEmbedding, Profile, StoredSignature
from server.store.samples import decode_config, encode_config
from server.store.tenants.user_key import MAX_USER_ID_BYTES, UserKeys, check_user_id

DIM = 384
VECTOR = np.random.default_rng(0).uniform(-1, 1, DIM).astype("f4")


def profile(**changes: object) -> Profile:
    values = {"user_id": "ada", "items": 3, "updated_ms": 1, "embedder": "00" * 8, "embedding": np.ones(DIM, "f4")}
    return Profile(**(values | changes))


def reread(profile: Profile) -> Profile:
    return records.decode_profile(records.encode_profile(profile))


@pytest.mark.parametrize(
    "changes",
    [
        {"user_id": "", "items": 0, "updated_ms": 0, "extra": {12: b"", 255: bytes(2000)}},
        {"user_id": "\N{GRINNING FACE}" * 64, "items": 1 << 20, "updated_ms": 1 << 50, "embedder": "ff00" * 4},
        {"adapter": AdapterNote("a" * 26, "mta3:9f2c41d0:shared:c+a03*1000", 1 << 30, 1 << 50)},
        {"adapter": AdapterNote("7" * 26, "mta3", 0, 0, f"00-{1:032x}-{2:016x}-01"), "extra": {13: b"\n \xff"}},
        {"phrases": phrase_table([[7, 8, 9]] * 2).tobytes()},
    ],
)
def test_record_round_trips_with_unknown_parts(changes: dict[str, object]) -> None:
    written = profile(embedding=records.as_stored(VECTOR), **changes)
    read = reread(written)
    assert np.array_equal(read.embedding, written.embedding)
    assert replace(read, embedding=written.embedding) == written


@pytest.mark.parametrize(("numbers", "scale"), [(0, 1e-4), (1, 1e-4), (12, 1e-4), (12, 1e30)])
def test_a_signature_survives_the_round_trip(numbers: int, scale: float) -> None:
    products = np.random.default_rng(0).standard_normal(numbers).astype("f4") * np.float32(scale)
    written = StoredSignature(Signature("9f2c41d0", 184, products), made_of_ms=1_700_000_000_000)
    read = reread(profile(signature=written)).signature
    assert (read.signature.bank, read.signature.tokens, read.made_of_ms) == ("9f2c41d0", 184, 1_700_000_000_000)
    assert read.signature.products == pytest.approx(products, rel=1e-2, abs=1e-3 * scale)


def test_an_empty_signature_counts_while_items_teach_the_same() -> None:
    empty = Signature("9f2c41d0", 0, np.zeros(2, np.float32))
    now = profile(updated_ms=7, signature=StoredSignature(empty, made_of_ms=7))
    assert reread(now).is_signed("9f2c41d0")
    before = struct.pack("<4sIQf2e", bytes.fromhex("9f2c41d0"), 0, 7, 0.0, 0.0, 0.0)
    assert not reread(profile(updated_ms=7, extra={8: before})).is_signed("9f2c41d0")


@pytest.mark.parametrize("wrong", [(1, np.nan), (1, np.inf), (1, -np.inf), (3e38, 3e38)])
def test_signature_without_a_finite_length_is_read_as_empty(wrong: tuple[float, float]) -> None:
    written = StoredSignature(Signature("9f2c41d0", 184, np.array(wrong, np.float32)), made_of_ms=7)
    kept = struct.pack("<4sIQf2e", bytes.fromhex("9f2c41d0"), 184, 7, np.nan, np.nan, np.nan)
    for record in (profile(signature=written), profile(extra={8: kept})):
        read = reread(record).signature
        assert (read.signature.bank, read.signature.tokens, read.made_of_ms) == ("9f2c41d0", 0, 7)
        assert read.signature.products.tolist() == [0, 0]


@pytest.mark.parametrize(("tag", "cut"), [(8, bytes(21)), (9, bytes(17))], ids=["signature", "second embedding"])
def test_a_damaged_part_is_refused_as_part_of_the_record(tag: int, cut: bytes) -> None:
    for damaged in (b"", b"short", cut):
        with pytest.raises(ValueError, match="profile record"):
            reread(profile(extra={tag: damaged}))


@pytest.mark.parametrize("damaged", [b"short", bytes(11)])
def test_a_damaged_phrase_table_is_refused_as_part_of_the_record(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="phrase"):
        reread(profile(phrases=damaged))


def test_profile_is_read_by_both_embedders_for_the_same_items() -> None:
    mine, theirs = (np.eye(DIM, dtype="f4")[place] for place in (0, 1))
    both = profile(embedding=mine, other=OtherEmbedding("22" * 8, theirs, profile().updated_ms))
    read = reread(both)
    for embedder, embedding in ((both.embedder, mine), ("22" * 8, theirs)):
        seen = read.with_embedder(embedder)
        assert (seen.embedder, seen.embedding.tolist()) == (embedder, embedding.tolist())
        back = seen.with_embedder(both.embedder)
        assert back.embedding.tolist() == mine.tolist()
    assert read.with_embedder("11" * 8) is None
    assert replace(read, updated_ms=read.updated_ms + 1).with_embedder("22" * 8) is None


def test_a_record_cut_anywhere_or_of_another_version_is_refused() -> None:
    record = records.encode_profile(profile())
    assert record != records.encode_profile(profile())
    for cut in range(len(record)):
        with pytest.raises(ValueError, match="profile record"):
            records.decode_profile(record[:cut])
    with pytest.raises(ValueError, match="version"):
        records.decode_profile(b"\x09" + record[1:])


def test_an_item_and_a_vector_come_back_as_they_were() -> None:
    for item in (records.StoredItem(0, {}), records.StoredItem(1 << 40, {"text": '\0 "用户"\n', "": "é"})):
        assert records.decode_item(records.encode_item(item)) == item
    read = records.decode_vector(records.encode_vector(records.StoredVector("0123456789abcdef", VECTOR)))
    assert read.embedder == "0123456789abcdef"
    assert np.array_equal(read.vector, records.as_stored(VECTOR))
    assert read.vector.dtype == np.float32
    assert read.vector == pytest.approx(VECTOR, abs=1e-3)


USER = "axi2q2svfyrolurh6ecirfzy3m"
OLD = '{"rank":2,"steps":16,"learning_rate":0.02,"holdout":0.2,"strength":1.0,"seed":0}'


def test_a_job_id_comes_back_from_its_text_and_from_no_other() -> None:
    for number in (1, 10, 9_999_999_999):
        assert parse_job_id(f"{USER}.{number}") == JobId(USER, number)
        assert str(JobId(USER, number)) == f"{USER}.{number}"
    for text in ("", "a", "a.", ".1", "a.01", "a.-1", "a.1.2", "a.x", "a/b.1", "a.²"):
        assert (text, parse_job_id(text), parse_job_id(text.replace("a", USER, 1))) == (text, None, None)


def test_config_round_trips_and_an_old_one_gets_default_budget() -> None:
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


SECRET = "0123456789abcdef"


@pytest.mark.parametrize(
    "user_id", ["a", "ada@example.org", "ada:1", "Ångström", "用户", "x" * 256, "é" * 128, "...", "-", "%2F"]
)
def test_printable_ids_are_accepted(user_id: str) -> None:
    assert check_user_id(user_id) == user_id


@pytest.mark.parametrize(
    "user_id",
    [
        *("", " ", "a b", "a/b", "a\\b", "{a", "a}", ".", "..", "a\n", "a\tb", "a\0b", "\x7f", "a\u200bb", "\ud800"),
        *("a\u2028b", "a\u00a0b", "a\ufffdb", "x" * 257, "é" * 129, "e\u0301" * 128, "x" * 10_000),
    ],
)
def test_other_ids_are_refused(user_id: str) -> None:
    with pytest.raises(ValueError, match="must"):
        check_user_id(user_id)


@given(st.text())
def test_no_accepted_id_can_leave_its_place_in_a_path_or_a_key(user_id: str) -> None:
    try:
        check_user_id(user_id)
    except ValueError:
        return
    assert 0 < len(user_id.encode()) <= MAX_USER_ID_BYTES
    assert user_id not in (".", "..")
    assert not set(user_id) & set("/\\{} \r\n\t\0")


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_keys_fit_the_grammar_of_recipes_and_separate_users(one: str, other: str) -> None:
    keys = UserKeys(SECRET, "default")
    key = keys.key(one)
    recipe = FusionRecipe("00000000", FusionMethod.SHARED, True, (), UserAdapterId(key, key))
    assert parse_recipe(recipe.name) == recipe
    assert (key == keys.key(other)) == (normalize("NFC", one) == normalize("NFC", other))


@pytest.mark.parametrize("name", ["José", "Ångström", "한국어사용자", "ἀνήρ"])
def test_a_name_is_one_user_however_its_characters_are_composed(name: str) -> None:
    keys = UserKeys(SECRET, "default")
    composed, decomposed = normalize("NFC", name), normalize("NFD", name)
    assert composed != decomposed == check_user_id(decomposed)
    assert keys.key(composed) == keys.key(decomposed)
    assert keys.key("José") == "aga2tyuycnypt6ddapyui5nixe"  # as it always was


def test_key_and_cache_salt_depend_on_secret_and_tenant() -> None:
    keys = UserKeys(SECRET, "a")
    assert keys.cache_salt == UserKeys(SECRET, "a").cache_salt
    found = [(each.key("ada"), each.cache_salt) for each in (keys, UserKeys(SECRET, "b"), UserKeys(SECRET + "x", "a"))]
    assert len({*itertools.chain(*found), keys.key("cache salt")}) == 7


@pytest.mark.parametrize(("secret", "tenant"), [(None, "a"), ("", "a"), ("short", "a"), (SECRET, ""), (SECRET, "a\0b")])
def test_short_secret_and_ambiguous_tenant_are_refused(secret: str | None, tenant: str) -> None:
    with pytest.raises(MtaError, match="MTA_TENANT" if secret == SECRET else "MTA_SECRET"):
        UserKeys(secret, tenant)
