"""Items: every accepted shape, every refusal with the field at fault, and the embedding of them all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bank.errors import ProfileError
from bank.items.profile import item_pair, item_text, parse_item, profile_embedding
from bank.items.tasks import get_task

HEADLINE = get_task("news_headline")
RATING = get_task("movie_rating")
CHAT = get_task("chat")


def test_a_lamp_item_gives_the_pair_to_train_on_and_the_text_to_embed_and_nothing_the_task_does_not_know() -> None:
    item = parse_item({"id": "7", "title": "Big News", "text": "It happened.", "date": "2020-01-01"}, HEADLINE, 0)
    assert (item.id, set(item.fields)) == ("7", {"title", "text"})
    assert item_pair(item, HEADLINE) == ("Generate a headline for the following article: It happened.", "Big News")
    assert item_text(item, HEADLINE) == "Big News\nIt happened."
    abstract = parse_item({"title": "On Tides", "abstract": "They rise."}, get_task("scholarly_title"), 0)
    assert set(item_text(abstract, CHAT).split("\n")) == {"On Tides", "They rise."}  # of another task: all it has


def test_numbers_are_texts_with_all_their_digits() -> None:
    """As an id, `time.time()` tells items apart."""
    number, text = (parse_item({"text": "Dogma (1999)", "score": score}, RATING, 0) for score in (5, "5"))
    assert item_pair(number, RATING) == item_pair(text, RATING)
    ids = [parse_item({"id": number, "text": "a"}, CHAT, 0).id for number in (1700000000.123, 1700000999.9, 5.0, 5)]
    assert ids == ["1700000000.123", "1700000999.9", "5", "5"]


def test_an_input_output_pair_serves_every_task_and_is_embedded_without_the_instruction() -> None:
    pair = "Generate a headline for the following article: It happened.", "Big News"
    item = parse_item(dict(zip(("input", "output"), pair, strict=True)), HEADLINE, 0)
    assert item_pair(item, HEADLINE) == pair
    assert item_text(item, HEADLINE) == "It happened.\nBig News"


def test_plain_text_is_embedded_and_trains_nothing_with_half_a_pair_beside_it_too() -> None:
    for task in (HEADLINE, RATING, CHAT):
        item = parse_item({"text": "I like trains."}, task, 0)
        assert item_text(item, task) == "I like trains."
        assert item_pair(item, task) is None
    assert item_pair(parse_item({"text": "a", "input": "b"}, CHAT, 0), CHAT) is None


def test_braces_in_a_users_text_are_text() -> None:
    item = parse_item({"title": "{title} {0} {", "text": "{text}"}, HEADLINE, 0)
    assert item_pair(item, HEADLINE) == ("Generate a headline for the following article: {text}", "{title} {0} {")


def test_without_an_id_equal_content_has_an_equal_id() -> None:
    first = parse_item({"text": "a", "title": "b", "noise": 1}, HEADLINE, 0)
    again = parse_item({"title": "b", "text": "a"}, HEADLINE, 5)
    other = parse_item({"title": "b", "text": "A"}, HEADLINE, 0)
    assert first.id == again.id != other.id


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ("text", "items.3"),
        (None, "items.3"),
        ({}, "items.3.text"),
        ({"score": "5"}, "items.3.text"),
        ({"text": " \n\t"}, "items.3.text"),
        ({"text": 1.5 + 1j}, "items.3.text"),
        ({"text": True}, "items.3.text"),
        ({"text": float("nan")}, "items.3.text"),
        ({"text": "a\0b"}, "items.3.text"),
        ({"text": "a\ud800b"}, "items.3.text"),
        ({"text": "a", "title": {"b": 1}}, "items.3.title"),
        ({"input": "a"}, "items.3.output"),
        ({"output": "a"}, "items.3.input"),
        ({"text": "a", "id": ""}, "items.3.id"),
        ({"text": "a", "id": "x" * 257}, "items.3.id"),
    ],
)
def test_an_item_that_cannot_stand_is_refused_by_field(raw: object, param: str) -> None:
    with pytest.raises(ProfileError) as caught:
        parse_item(raw, RATING if raw == {"score": "5"} else HEADLINE, 3)
    assert caught.value.param == param
    assert param in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_json_value_gets_past_the_parser_as_anything_but_an_item_or_a_profile_error(raw: object) -> None:
    try:
        item = parse_item(raw, HEADLINE, 0)
    except ProfileError:
        return
    assert item_text(item, HEADLINE).strip()


def test_the_profile_is_the_normalised_mean_and_zeros_where_the_items_cancel_out() -> None:
    for vectors, mean in (([[1, 0, 0], [0, 1, 0]], [2**-0.5, 2**-0.5, 0]), ([[1, 0], [-1, 0]], [0, 0])):
        embedding = profile_embedding(np.array(vectors, dtype=np.float32))
        np.testing.assert_allclose(embedding, mean, rtol=1e-6)
        assert embedding.dtype == np.float32
    with pytest.raises(ProfileError, match="at least one item"):
        profile_embedding(np.zeros((0, 4), dtype=np.float32))
