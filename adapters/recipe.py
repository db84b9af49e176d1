"""Fusion recipes and their canonical names.

Grammar::

    name    = "mta3:" bank ":" method ":" terms [ ":u-" user ]
    bank    = 8 lower-case hex digits, the beginning of the bank's fingerprint
    method  = "cat" | "shared"
    terms   = "c" *( "+" anchor ) | anchor *( "+" anchor ) | "c~" steps
    anchor  = "a" index "*" weight                               weight in per mille, -4000 to 4000, never 0
    steps   = base64url without padding of int8 numbers          one for each direction, -127 to 127, not all 0
    user    = user-key "." adapter-id                            26 base32 characters (128 bits) each

`c` is the common row at weight 1; the other terms add weighted anchor rows, in id order and each once, and their
weights may have any sum. In a bank of directions each row is as long as one standard deviation of the prior, and a step
is a sixteenth of it. Workers build the adapter from the name alone, and vLLM keys its caches by the name. Equal recipes
must therefore have equal names: a non-canonical name is rejected.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from adapters.errors import RecipeError, excerpt

FORMAT = "mta3"
PER_MILLE = 1000
MAX_WEIGHT = 4000  # largest absolute weight of an anchor, per mille
MAX_ANCHORS = 1_000_000
MAX_NAME_CHARS = 4096
MAX_TERMS = 334  # number that always fits into a name: 12 characters each (`+a1023*-4000`) and 78 for the other parts
STEPS_PER_DEVIATION = 16
MAX_STEP = 127  # eight standard deviations
MAX_DIRECTIONS = 384

_BANK = re.compile(r"[0-9a-f]{8}")
_BASE32_128 = r"[a-z2-7]{25}[aeimquy4]"  # 16 bytes without padding; the last character carries three bits
_USER_ADAPTER = re.compile(rf"{_BASE32_128}\.{_BASE32_128}")
_TERM = re.compile(r"a(\d{2}|[1-9]\d{2,5})\*(-?[1-9]\d{0,3})", re.ASCII)
_STEPS = "c~"  # before the steps along directions


class FusionMethod(StrEnum):
    """Method that combines the terms of a recipe into one adapter (formulas in `adapters/fusion.py`)."""

    CAT = "cat"
    SHARED = "shared"


@dataclass(frozen=True, slots=True)
class Term:
    """An anchor's index in its bank, and the weight of its row in per mille."""

    anchor: int
    weight: int


@dataclass(frozen=True, slots=True)
class UserAdapterId:
    """`<user key>.<id>`, each 128 bits in base32 (`server/store/tenants/user_key.py`); RecipeError otherwise."""

    user_key: str
    id: str

    def __post_init__(self) -> None:
        if not _USER_ADAPTER.fullmatch(str(self)):
            raise RecipeError(f"user adapter must be <user key>.<id> in base32, got {excerpt(str(self))}")

    def __str__(self) -> str:
        return f"{self.user_key}.{self.id}"


@dataclass(frozen=True, slots=True)
class FusionRecipe:
    """The components of an adapter; raises RecipeError unless canonical. Equal recipes give equal adapters."""

    bank: str  # first 8 hex digits of the bank's fingerprint
    method: FusionMethod
    common: bool  # whether to add the common row
    terms: tuple[Term, ...]
    user_adapter: UserAdapterId | None = None
    steps: tuple[int, ...] = ()  # one for each direction of the bank; a recipe has steps or terms

    def __post_init__(self) -> None:
        if not _BANK.fullmatch(self.bank):
            raise RecipeError(f"bank must be 8 lower-case hex digits, got {excerpt(self.bank)}")
        if not self.terms and not self.common:
            raise RecipeError("a recipe needs the common row or at least one anchor")
        anchors = [term.anchor for term in self.terms]
        if any(b <= a for a, b in itertools.pairwise(anchors)):
            raise RecipeError(f"anchors must be in id order, each once, got {excerpt(anchors)}")
        for term in self.terms:
            if not 0 <= term.anchor < MAX_ANCHORS:
                raise RecipeError(f"anchor index must be 0 to {MAX_ANCHORS - 1}, got {term.anchor}")
            if not -MAX_WEIGHT <= term.weight <= MAX_WEIGHT or not term.weight:
                raise RecipeError(
                    f"weight must be -{MAX_WEIGHT} to {MAX_WEIGHT} per mille and not 0, got {term.weight}"
                )
        if self.steps:
            self._check_steps()

    def _check_steps(self) -> None:
        if not self.common or self.terms or self.method is not FusionMethod.SHARED:
            raise RecipeError("a recipe with steps has method `shared`, the common row and no anchors")
        if len(self.steps) > MAX_DIRECTIONS or not any(self.steps):
            raise RecipeError(f"steps must be 1 to {MAX_DIRECTIONS} numbers, not all 0, got {excerpt(self.steps)}")
        if any(abs(step) > MAX_STEP for step in self.steps):
            raise RecipeError(f"steps must be -{MAX_STEP} to {MAX_STEP}, got {excerpt(self.steps)}")

    @property
    def name(self) -> str:
        """Return the canonical name; `parse_recipe` is the inverse."""
        terms = (["c"] if self.common else []) + [f"{anchor_id(t.anchor)}*{t.weight}" for t in self.terms]
        if self.steps:
            raw = bytes(step & 0xFF for step in self.steps)
            terms = [_STEPS + base64.urlsafe_b64encode(raw).decode().rstrip("=")]
        stacked = f":u-{self.user_adapter}" if self.user_adapter else ""
        return f"{FORMAT}:{self.bank}:{self.method.value}:{'+'.join(terms)}{stacked}"

    def rows(self, common: int) -> list[tuple[int, float]]:
        """Return the rows to sum and their weights, in the bank's matrix with the common row at index `common`."""
        weighted = [(common, 1.0)] * self.common + [(term.anchor, term.weight / PER_MILLE) for term in self.terms]
        return weighted + [(row, step / STEPS_PER_DEVIATION) for row, step in enumerate(self.steps) if step]

    @property
    def plain(self) -> FusionRecipe:
        return replace(self, user_adapter=None)


def anchor_id(index: int) -> str:
    """Return the public id of the anchor at `index`, e.g. `a03`, `a17` or `a1042`."""
    return f"a{index:02d}"


def is_recipe_name(name: str | None) -> bool:
    return name is not None and name.startswith(f"{FORMAT}:")


def bank_of(name: str) -> str:
    """Return the bank's 8 hex digits from a stored recipe name, in a current or former format."""
    return name.split(":", 2)[1]


def parse_recipe(name: str) -> FusionRecipe:
    """Parse a canonical name, e.g. `mta3:9f2c41d0:shared:c+a03*286+a17*-214`; raise RecipeError for any other text."""
    if len(name) > MAX_NAME_CHARS:
        raise RecipeError(f"recipe name has {len(name)} characters, but at most {MAX_NAME_CHARS} are allowed")
    parts = name.split(":")
    if len(parts) not in (4, 5) or parts[0] != FORMAT:
        raise RecipeError(f"not a recipe name ({FORMAT}:bank:method:terms[:u-user]): {excerpt(name)}")
    _, bank, method, terms = parts[:4]
    if method not in list(FusionMethod):
        raise RecipeError(f"unknown method {excerpt(method)} in recipe {excerpt(name)}")
    steps = _parse_steps(terms, name) if terms.startswith(_STEPS) else ()
    texts = ["c"] if steps else terms.split("+")
    common = texts[0] == "c"
    parsed = tuple(_parse_term(text, name) for text in (texts[1:] if common else texts))
    user_adapter = None
    if len(parts) == 5:
        if not parts[4].startswith("u-"):
            raise RecipeError(f"malformed user adapter {excerpt(parts[4])} in recipe {excerpt(name)}")
        user_key, _, adapter_id = parts[4][2:].partition(".")
        user_adapter = UserAdapterId(user_key, adapter_id)
    recipe = FusionRecipe(bank, FusionMethod(method), common, parsed, user_adapter, steps)
    if recipe.name != name:
        raise RecipeError(f"recipe {excerpt(name)} is not canonical: it should read {excerpt(recipe.name)}")
    return recipe


def _parse_term(text: str, name: str) -> Term:
    if match := _TERM.fullmatch(text):
        return Term(int(match[1]), int(match[2]))
    raise RecipeError(f"malformed term {excerpt(text)} in recipe {excerpt(name)}")


def _parse_steps(text: str, name: str) -> tuple[int, ...]:
    encoded = text.removeprefix(_STEPS)
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw:
        raise RecipeError(f"malformed steps {excerpt(text)} in recipe {excerpt(name)}: they are numbers in base64url")
    return tuple(memoryview(raw).cast("b"))


def per_mille(weights: Sequence[float], total: int = PER_MILLE, grain: int = 1) -> list[int]:
    """Scale weights to the sum `total` and round to multiples of `grain` by largest remainder; ties go to the earlier.

    The largest weight also gets the rest of `total` / `grain`. RecipeError for negative, infinite or only zero weights.
    """
    scale = sum(weights)
    if not all(0 <= w < float("inf") for w in weights) or not 0 < scale < float("inf"):
        raise RecipeError(f"weights must be finite, non-negative and not all zero, got {excerpt(list(weights))}")
    units, rest = divmod(total, grain)
    exact = [w / scale * units for w in weights]
    floors = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], -weights[i], i))
    for i in by_remainder[: units - sum(floors)]:
        floors[i] += 1
    rounded = [grain * n for n in floors]
    rounded[max(range(len(exact)), key=lambda i: (weights[i], -i))] += rest
    return rounded
