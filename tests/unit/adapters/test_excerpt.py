"""Values in error messages."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import excerpt


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a" * 8, "'aaaaaaaa'"),
        ("a" * 9, "'aaaaaaa…'"),
        ("it's fine", '"it\'s fi…"'),
        (list(range(9)), "[0, 1, 2,…"),
    ],
)
def test_a_value_is_cut_and_a_text_stays_quoted(value: Any, shown: str) -> None:
    assert excerpt(value, 10) == shown
