"""Which user ids are accepted, and what stands for them elsewhere."""

from __future__ import annotations

import itertools
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import MtaError
from adapters.recipe import FusionMethod, FusionRecipe, UserAdapterId, parse_recipe
from server.store.tenants.user_key import MAX_USER_ID_BYTES, UserKeys, check_user_id

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


def test_a_key_depends_on_secret_and_tenant_as_the_cache_salt_does_which_is_no_users() -> None:
    keys = UserKeys(SECRET, "a")
    assert keys.cache_salt == UserKeys(SECRET, "a").cache_salt
    found = [(each.key("ada"), each.cache_salt) for each in (keys, UserKeys(SECRET, "b"), UserKeys(SECRET + "x", "a"))]
    assert len({*itertools.chain(*found), keys.key("cache salt")}) == 7


@pytest.mark.parametrize(("secret", "tenant"), [(None, "a"), ("", "a"), ("short", "a"), (SECRET, ""), (SECRET, "a\0b")])
def test_a_short_secret_and_a_tenant_that_could_be_mistaken_are_refused(secret: str | None, tenant: str) -> None:
    with pytest.raises(MtaError, match="MTA_TENANT" if secret == SECRET else "MTA_SECRET"):
        UserKeys(secret, tenant)
