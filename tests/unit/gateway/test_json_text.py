"""What counts as JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.gateway.http.json_text import MAX_FIELDS, MAX_STRUCTURE_BYTES, parse_json, parse_lines

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))  # NUL is refused on purpose
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
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
        (b"{", "body", "not JSON"),
        (b'{"a": 1} x', "body", "not JSON"),
        (b"'a'", "body", "not JSON"),
        (b'"\xff"', "body", "UTF-8"),
        (b"[" * 100_000, "body", "recursion"),
        (b"[" * 500 + b"]" * 500, "body", "recursion"),
        (b"1" * 5000, "body", "out of range"),
        (b'{"%s": {"b": "\\u0000"}}' % (b"a" * 1000), "a" * 119 + "…", "NUL"),
        # Lines, which are counted before they are parsed
        (b"{" + b"\n{" * 2, "rows", "rows has 3 lines, at most 2"),
        (b"\n" * 100, "rows", "101 lines"),
        (b"{\n" * 100, "rows", "101 lines"),
        (rb'{"a": 1}' + b"\n" + rb'{"a": ["x", "\u0000"]}', "rows.1.a.1", "NUL"),
    ],
)
def test_a_fault_is_named(body: bytes, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_lines(body, "rows", 2) if param.startswith("rows") else parse_json(body)
    assert caught.value.param == param
    assert len(caught.value.message) < 300


def test_text_may_hold_any_quotes_commas_and_white_space() -> None:
    text = '\\",[{"' * (MAX_STRUCTURE_BYTES // 4)
    assert parse_json(json.dumps({"a": text}).encode()) == {"a": text}
    assert parse_json(b"[1,\n" + b" " * MAX_STRUCTURE_BYTES * 2 + b"2]") == [1, 2]
    assert parse_json(rb'{"a": "\\u0000"}') == {"a": "\\u0000"}


@pytest.mark.parametrize("values", [["1"], ['""'], ["[]"], ['{"a":1}'], ["1", '"a,b"', "{}"]])
def test_too_many_values_are_refused(values: list[str]) -> None:
    most = MAX_STRUCTURE_BYTES // len(",".join(values))
    parse_json(f"[{','.join(values * (most // 3))}]".encode())
    with pytest.raises(InvalidRequest) as caught:
        parse_json(f"[{','.join(values * (most * 2))}]".encode())
    assert caught.value.code == "too_many_values"


def test_an_object_of_too_many_fields_is_refused() -> None:
    fields = {str(number): number for number in range(MAX_FIELDS + 1)}
    with pytest.raises(InvalidRequest, match=str(MAX_FIELDS + 1)):
        parse_json(json.dumps([{"a": [fields]}]).encode())


def test_blank_lines_are_passed_over() -> None:
    assert parse_lines(b'\n{"a": 1}\r\n \n[2]\n\n', "rows", 3) == [{"a": 1}, [2]]
