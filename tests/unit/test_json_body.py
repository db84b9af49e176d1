"""What counts as JSON, and how a fault is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.http.json_body import parse_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # NUL is refused on purpose
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0")), inner)
    ),
    max_leaves=20,
)


@given(JSON, st.booleans())
def test_every_json_value_is_read_as_pythons_reader_does(value: object, escaped: bool) -> None:
    body = json.dumps(value, ensure_ascii=escaped).encode()
    assert parse_json(body) == json.loads(body)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"temperature": NaN}', "temperature", "finite"),
        (b'{"a": {"b": [1, -Infinity]}}', "a.b.1", "finite"),
        (rb'{"prompt": "a\u0000b"}', "prompt", "NUL"),
        (rb'{"items": [{"text": "x"}, {"text": "\ud800"}]}', "items.1.text", "surrogate"),
        (rb'{"\ud800": 1}', "body", "surrogate"),
        (rb'{"a": {"b\u0000": 1}}', "a", "NUL"),
        (b"", "body", "empty"),
        (b"  ", "body", "empty"),
        (b"{", "body", "no JSON"),
        (b'{"a": 1} x', "body", "no JSON"),
        (b"'a'", "body", "no JSON"),
        (b'"\xff"', "body", "UTF-8"),
        (b"[" * 100_000, "body", "recursion"),
        (b"[" * 500 + b"]" * 500, "body", "recursion"),
        (b"1" * 5000, "body", "out of range"),
    ],
)
def test_a_fault_is_named(body: bytes, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_json(body)
    assert caught.value.param == param
    assert len(caught.value.message) < 300


def test_an_escaped_backslash_before_u0000_is_text() -> None:
    assert parse_json(rb'{"a": "\\u0000"}') == {"a": "\\u0000"}
