"""The recipe's name: one text per recipe, and nothing else is read."""

from __future__ import annotations

import itertools
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapters.errors import RecipeError
from adapters.recipe import (
    MAX_DIRECTIONS,
    MAX_TERMS,
    FusionMethod,
    FusionRecipe,
    Term,
    UserAdapterId,
    bank_of,
    is_recipe_name,
    parse_recipe,
    per_mille,
)

BASE32 = string.ascii_lowercase + "234567"
keys = st.builds(lambda head, tail: head + tail, st.text(BASE32, min_size=25, max_size=25), st.sampled_from("aeimquy4"))


@st.composite
def recipes(draw: st.DrawFn) -> FusionRecipe:
    common = draw(st.booleans())
    anchors = sorted(draw(st.sets(st.integers(0, 120_000), min_size=0 if common else 1, max_size=6)))
    terms = tuple(Term(anchor, draw(st.integers(-4000, 4000).filter(bool))) for anchor in anchors)
    user = draw(st.none() | st.builds(UserAdapterId, keys, keys))
    bank = draw(st.text("0123456789abcdef", min_size=8, max_size=8))
    if common and not terms and draw(st.booleans()):
        steps = draw(st.lists(st.integers(-127, 127), min_size=1, max_size=384).filter(any))
        return FusionRecipe(bank, FusionMethod.SHARED, True, (), user, tuple(steps))
    return FusionRecipe(bank, draw(st.sampled_from(FusionMethod)), common, terms, user)


@given(recipes())
def test_parsing_a_name_gives_the_recipe_back(recipe: FusionRecipe) -> None:
    assert parse_recipe(recipe.name) == recipe


def test_name_holds_the_most_terms_or_steps_of_a_recipe() -> None:
    user, longest = UserAdapterId("a" * 26, "b" * 25 + "a"), tuple(Term(1000 + i, -4000) for i in range(MAX_TERMS))
    for terms, steps in ((longest, ()), ((), (-127,) * MAX_DIRECTIONS)):
        recipe = FusionRecipe("9f2c41d0", FusionMethod.SHARED, True, terms, user, steps)
        assert parse_recipe(recipe.name) == recipe


def test_a_name_reads_as_the_grammar_says() -> None:
    along = FusionRecipe("9f2c41d0", FusionMethod.SHARED, True, (), steps=(1, -5, 0, 127, -127))
    assert along.name == "mta3:9f2c41d0:shared:c~AfsAf4E"
    assert along.rows(5) == [(5, 1.0), (0, 1 / 16), (1, -5 / 16), (3, 127 / 16), (4, -127 / 16)]
    user = UserAdapterId("a" * 26, "b" * 25 + "a")
    recipe = FusionRecipe("9f2c41d0", FusionMethod.SHARED, True, (Term(3, 286), Term(117, -4000)), user)
    assert recipe.name == f"mta3:9f2c41d0:shared:c+a03*286+a117*-4000:u-{user}"


@given(recipes(), st.data())
def test_every_mutation_of_a_name_is_refused_or_itself_canonical(recipe: FusionRecipe, data: st.DataObject) -> None:
    name = recipe.name
    at, cut = data.draw(st.integers(0, len(name))), data.draw(st.integers(0, 2))
    swapped = name[at : at + cut][::-1]
    put = data.draw(st.characters() | st.sampled_from(["", swapped, *"mta3:*+c-u.0129 \n/"]))
    mutated = name[:at] + put + name[at + cut :]
    try:
        parsed = parse_recipe(mutated)
    except RecipeError:
        return
    assert parsed.name == mutated


SHARED, CAT = "mta3:9f2c41d0:shared:", "mta3:9f2c41d0:cat:"


@pytest.mark.parametrize(
    "name",
    [
        *("", "base", "mta4:9f2c41d0:shared:c", f" {SHARED}c", f"{SHARED}c\n"),
        *(f"{SHARED}c+a03*{weight}" for weight in ("0", "-0", "+100", "4001", "-4001", "-014")),
        *(
            f"{SHARED}{terms}"
            for terms in ("c+a01*7+v03*120", "a03*500+c", "c+c", "c+", "c:", "c:u-", "c:u-../../etc/passwd")
        ),
        f"{SHARED}c:u-" + "a" * 26 + "." + "a" * 25 + "b",  # set padding bits
        f"{SHARED}c:u-" + "A" * 26 + "." + "a" * 26,
        *(f"mta3:{head}:a03*1000" for head in ("9F2C41D0:cat", "9f2c41d:cat", "9f2c41d0:ties", "9f2c41d0:CAT")),
        f"{CAT}a17*429+a03*571",  # out of order
        f"{CAT}a03*500+a03*500",  # named twice
        f"{CAT}a٠٣*1000",  # digits, but not ASCII ones
        *(f"{CAT}{terms}" for terms in ("", "a03*0571+a17*429", "a03*0+a17*1000", "a3*1000", "a003*1000")),
        CAT + "+".join(f"a{i}*1" for i in range(100, 1100)),
        *(f"{SHARED}{terms}" for terms in ("c~", "c~A", "c~AA", "c~AQ==", "c~AR", "c~gA", "c~A+", "c~AQ+a01*3", "~AQ")),
        f"{SHARED}c~{'AAAA' * 128}AQ",  # 385 steps
        f"{CAT}c~AQ",
    ],
)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(name)


def test_a_stored_recipe_names_its_bank_in_every_format() -> None:
    for name in ("mta3:9f2c41d0:shared:c+a03*571", "mta2:9f2c41d0:shared:c+a03*-571", "mta1:9f2c41d0"):
        assert bank_of(name) == "9f2c41d0"
    assert is_recipe_name("mta3:x")
    assert not any(is_recipe_name(name) for name in ("mta3", "mta2:x", "my-adapter", None))


@example(weights=[2.9943896329180766, 2.994389632918077, 2.9943896329180766], total=7, grain=1)
@given(
    st.lists(st.just(0.0) | st.floats(0.001, 1e6), min_size=1, max_size=40).filter(any),
    st.integers(1, 1000),
    st.just(1) | st.integers(1, 200),
)
def test_shares_keep_the_sum_and_the_largest_has_what_is_left(weights: list[float], total: int, grain: int) -> None:
    shares = per_mille(weights, total, grain)
    assert sum(shares) == total
    assert grain > 1 or all(abs(n - w / sum(weights) * total) < 1 + 1e-6 for n, w in zip(shares, weights, strict=True))
    odd = [share for share in shares if share % grain]
    assert odd in ([], [max(shares)])
    for one, other in itertools.product(zip(weights, shares, strict=True), repeat=2):
        assert one[0] <= other[0] or one[1] >= other[1]


def test_largest_remainder_is_rounded_up_and_bad_weights_fail() -> None:
    assert per_mille([2 / 3, 1 / 3]) == [667, 333]
    assert per_mille([1, 1, 1]) == [334, 333, 333]
    assert per_mille([0.6, 0.3], total=500) == [333, 167]
    assert per_mille([0.6, 0.3], total=500, grain=50) == [350, 150]
    assert per_mille([0.6, 0.3], total=510, grain=50) == [360, 150]
    for none in ([0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf")], list[float]()):
        with pytest.raises(RecipeError):
            per_mille(none)


KEY = "a" * 26


def test_no_other_text_is_a_user_adapters_id() -> None:
    odd = f"{KEY[1:]}b.{KEY}"  # is not the end of 128 bits
    shapes = ("", ".", KEY, f"{KEY}.", f".{KEY}", f"{KEY}.{KEY[1:]}", f"{KEY}.{KEY.upper()}", f"{KEY}.{KEY}.{KEY}")
    for text in (*shapes, odd, f"{KEY}.{KEY}\n"):
        with pytest.raises(RecipeError, match=r"<user key>\.<id>"):
            UserAdapterId(*text.partition(".")[::2])
