"""Phrase tables: what is a phrase, what proposes the next token, and how far a bank trusts it."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bank.building.phrases import TRUSTS, chosen
from bank.lookup.phrases import (
    LONGEST,
    MAX_BYTES,
    MAX_PHRASES,
    MAX_TOKENS,
    START,
    Reader,
    TrustedPhrases,
    decode_phrases,
    phrase_table,
    proposals,
    suffix_hash,
)

HELLO, ADA, THANKS, WEEK, BYE, END = range(10, 16)
TEXTS = [
    [HELLO, ADA, THANKS, BYE, END],
    [HELLO, ADA, WEEK, BYE, END],
    [HELLO, WEEK, END],
]
SHORT = st.lists(st.integers(0, 3), min_size=1, max_size=7)  # too short to be a copy


def counted(texts: list[list[int]]) -> dict[tuple[int, int], tuple[int, float, int]]:
    """The phrases by suffix and token, with length, share and limit, counted one by one."""
    totals, counts = Counter[tuple[int, ...]](), defaultdict[tuple[tuple[int, ...], int], Counter[int]](Counter)
    for place, text in enumerate(texts):
        whole = [START, *text]
        for at in range(1, len(whole)):
            for length in range(1, min(LONGEST, at) + 1):
                suffix = tuple(whole[at - length : at])
                totals[suffix] += 1
                counts[suffix, whole[at]][place] += 1
    return {
        (suffix_hash(suffix, len(suffix)), token): (len(suffix), sum(by.values()) / totals[suffix], max(by.values()))
        for (suffix, token), by in counts.items()
        if len(by) > 1
    }


@given(st.lists(SHORT, max_size=6))
def test_a_table_has_what_stands_in_two_texts(texts: list[list[int]]) -> None:
    table, wanted = phrase_table(texts), counted(texts)
    assert {(int(each["suffix"]), int(each["token"])) for each in table} == wanted.keys()
    for each in table:
        length, share, limit = wanted[int(each["suffix"]), int(each["token"])]
        assert (each["length"], each["limit"]) == (length, limit)
        assert each["share"] / 255 == pytest.approx(share, abs=1 / 255)


@pytest.mark.parametrize("count", [2, 6, 34, 300])
def test_shares_of_a_suffix_add_up_to_at_most_one(count: int) -> None:
    table = phrase_table([[HELLO, 100 + name] for name in range(count) for _ in range(2)])
    after_hello = table[table["suffix"] == suffix_hash([HELLO], 1)]
    assert int(after_hello["share"].astype(int).sum()) <= 255


def test_a_long_text_and_its_copy_count_once() -> None:
    mail = list(range(100, 140))
    assert len(phrase_table([mail, [*mail, END]])) == 0
    assert len(phrase_table([mail, [*mail[:8], *range(200, 232)]])) > 0


def test_short_texts_that_are_equal_are_a_habit() -> None:
    assert len(phrase_table([[HELLO, END], [HELLO, END]])) > 0


def test_a_full_table_keeps_what_stands_in_most_texts() -> None:
    rare = [[token, END] for token in range(1000, 2000)]
    table = phrase_table([*rare[:500], *rare[:500], [HELLO, END], [HELLO, END], [HELLO, END]])
    assert len(table) == MAX_PHRASES
    assert len(table.tobytes()) <= MAX_BYTES
    assert suffix_hash([HELLO], 1) in table["suffix"]


def test_a_table_of_very_many_texts_is_of_the_newest() -> None:
    rare = [[token, END] for token in range(1000, 9000)]
    assert phrase_table([[HELLO, ADA], *rare[:2000], [HELLO, ADA]])["token"].tolist().count(ADA) > 0
    assert not {HELLO, ADA} & set(phrase_table([[HELLO, ADA], *rare, [HELLO, ADA]])["token"].tolist())
    assert len(phrase_table([[HELLO, ADA], [WEEK] * MAX_TOKENS, [HELLO, ADA]])) == 0


def test_the_longest_suffix_proposes() -> None:
    table = phrase_table(TEXTS)
    reader = Reader(table)
    assert table["token"][reader.proposing()].tolist() == [HELLO]
    assert reader.read(HELLO)
    assert table["token"][reader.proposing()].tolist() == [ADA]  # two of three; WEEK stands in one text alone
    assert not reader.read(WEEK)


def test_a_phrase_is_used_no_oftener_than_in_a_text() -> None:
    reader = Reader(phrase_table([[HELLO, BYE, BYE, END], [HELLO, BYE, BYE, END]]))
    answer = [HELLO, *[BYE] * 6]
    assert [reader.read(token) for token in answer] == [True, True, True, *[False] * 4]


def test_a_text_is_told_what_the_table_says_of_each_token() -> None:
    said = proposals(phrase_table(TEXTS), TEXTS[1])
    found = [(each.length, round(each.share, 2), round(each.shares, 2)) for each in said]
    assert found == [(1, 1.0, 1.0), (2, 0.67, 0.67), (0, 0.0, 0.0), (0, 0.0, 0.0), (1, 1.0, 1.0)]


def test_the_mixture_sums_to_one() -> None:
    table = phrase_table(TEXTS)
    trust = (0.3, 0.5, 0.8, 0.9)
    reader = Reader(table)
    proposing = reader.proposing()
    kept, _ = proposals(table, [HELLO])[0].mixed(trust)
    assert kept + float(TrustedPhrases(table, trust).weights[proposing].sum()) == pytest.approx(1)


def test_bytes_that_are_no_table_are_refused() -> None:
    table = phrase_table(TEXTS)
    assert np.array_equal(decode_phrases(table.tobytes()), table)
    for raw in (table.tobytes()[1:], bytes(MAX_BYTES + 11), bytes(11)):
        with pytest.raises(ValueError, match="phrase"):
            decode_phrases(raw)


def test_trust_gains_most_and_its_gain_is_of_others_choice() -> None:
    gains = np.zeros((7, LONGEST, len(TRUSTS)))
    gains[:, 0, 5], gains[:, 3, 9] = 0.1, 0.2
    gains[0, 0, 5], gains[0, 0, 6] = -0.5, 3.0  # somebody for whom much more would be right
    rule = chosen(gains)
    assert rule.trust == pytest.approx((TRUSTS[6], 0, 0, TRUSTS[9]))
    assert rule.people == 7
    alone = chosen(gains[1:])
    assert alone.trust[0] == TRUSTS[5]
    assert (alone.gain.mean, alone.gain.is_lower) == (pytest.approx(-0.3), True)
