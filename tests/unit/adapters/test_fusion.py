"""Fusion by every method against its own dense formula; user adapters as values and as bytes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from adapters.errors import FusionError, UserAdapterError
from adapters.fusion import fuse
from adapters.lora import LoraWeights, ModuleShape, RowLayout
from adapters.matrix import MetaMatrix, write_matrix
from adapters.recipe import FusionMethod, FusionRecipe, Term
from adapters.user_adapter import UserAdapter, decode_user_adapter, encode_user_adapter, stack
from bank.manifest import BankManifest, WeightRule
from tests.support.dense import dense_delta, dense_parts

MODULES = (ModuleShape("q", 24, 16), ModuleShape("down", 40, 24))
ANCHORS, RANK = 5, 4
CAT, SHARED = FusionMethod.CAT, FusionMethod.SHARED


def make_matrix(folder: Path, method: FusionMethod, common: bool) -> MetaMatrix:
    layout = RowLayout(MODULES, RANK, method is SHARED)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randn(layout.row_numbers, generator=generator) for _ in range(ANCHORS + common)]
    shared_a = torch.randn(layout.a_numbers, generator=generator) if layout.shared_a else None
    path = folder / "meta_loras.safetensors"
    write_matrix(path, layout, len(rows), rows, shared_a)
    return MetaMatrix.open(path, layout, ANCHORS, common)


STEPS = FusionRecipe("0" * 8, SHARED, True, (), steps=(16, -3, 0, 127, 1))


def recipe(method: FusionMethod, common: bool, *terms: tuple[int, int]) -> FusionRecipe:
    return FusionRecipe("0" * 8, method, common, tuple(Term(a, w) for a, w in terms))


@pytest.mark.parametrize(
    "wanted",
    [
        STEPS,
        *(
            recipe(method, common, *terms)
            for method in FusionMethod
            for common, terms in (
                (False, [(2, 1000)]),
                (False, [(0, 1), (1, 499), (4, 500)]),
                (True, []),
                (True, [(1, -2500), (3, 731)]),
                (True, [(0, 7), (1, 77), (2, 777), (3, 100), (4, 39)]),
            )
        ),
    ],
    ids=lambda wanted: wanted.name,
)
def test_fused_delta_equals_formula_and_is_rounded_once_in_bf16(tmp_path: Path, wanted: FusionRecipe) -> None:
    method, common = wanted.method, wanted.common
    matrix = make_matrix(tmp_path, method, common)
    fused, rounded = fuse(matrix, wanted, torch.float32), fuse(matrix, wanted)
    assert fused.rank == RANK * (1 if method is SHARED else common + len(wanted.terms))
    for module in MODULES:
        name, dense = module.name, dense_delta(matrix, wanted, module).float()
        assert fused.a[name].shape == (fused.rank, module.h_in)
        assert fused.b[name].shape == (module.h_out, fused.rank)
        torch.testing.assert_close(fused.delta(name), dense, rtol=1e-4, atol=1e-4)
        for exact, got in ((fused.a[name], rounded.a[name]), (fused.b[name], rounded.b[name])):
            # Sums run in another order: a few numbers may fall to the other side of a tie, and no farther.
            assert (exact.bfloat16() != got).float().mean() < 0.03
            torch.testing.assert_close(got, exact.bfloat16(), rtol=2**-7, atol=1e-6)
    if matrix.shared_a is not None:  # one A for all
        assert rounded.a["q"].untyped_storage().data_ptr() == matrix.shared_a.untyped_storage().data_ptr()


def test_released_linear_formula_differs_from_sum_of_anchors(tmp_path: Path) -> None:
    """`linear`, (Σ wᵢBᵢ)(Σ wᵢAᵢ), weighs each anchor by the square and adds cross terms."""
    matrix = make_matrix(tmp_path, CAT, common=False)
    cat = fuse(matrix, recipe(CAT, False, (0, 500), (1, 500)), torch.float32).delta("q")
    (a0, b0), (a1, b1) = (dense_parts(matrix, matrix.rows[i], MODULES[0]) for i in (0, 1))
    linear = ((b0 + b1) / 2 @ ((a0 + a1) / 2)).float()
    cross = (b0 @ a1 + b1 @ a0).float() / 4
    torch.testing.assert_close(linear, cat / 2 + cross, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(linear, cat, atol=1e-2)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (recipe(SHARED, False, (0, 1000)), "fuses by `cat`"),
        (recipe(CAT, True, (0, 1000)), "no common row"),
        (recipe(CAT, False, (0, 400), (1, 300), (2, 300)), "at most 2 anchors"),
        (recipe(CAT, False, (0, 400), (5, 600)), "anchors a00 to a04, but the recipe asks for a05"),
        (replace(recipe(CAT, False, (0, 1000)), bank="1" * 8), "belongs to the bank 11111111"),
    ],
)
def test_recipe_the_bank_cannot_fuse_is_refused_with_reason(wanted: FusionRecipe, message: str) -> None:
    rule, anchors = WeightRule(anchors=2), ("",) * ANCHORS
    bank = BankManifest.model_construct(method=CAT, common=False, anchors=anchors, weights=rule, fingerprint="0" * 64)
    bank.check(recipe(CAT, False, (3, 400), (4, 600)))
    with pytest.raises(FusionError, match=message):
        bank.check(wanted)


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    make_matrix(tmp_path, CAT, common=False)
    with pytest.raises(FusionError, match="the manifest says"):
        MetaMatrix.open(tmp_path / "meta_loras.safetensors", RowLayout(MODULES, RANK, False), ANCHORS + 1, False)


USER_RANK = 2
LAYOUT = RowLayout(MODULES, RANK, shared_a=True)
USERS_RECIPE = "mta3:9f2c41d0:shared:c+a03*286"


def lora(rank: int, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)

    def rounded(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).float()

    a, b = ({m.name: rounded(rank, m.h_in) for m in MODULES}, {m.name: rounded(m.h_out, rank) for m in MODULES})
    return LoraWeights(rank, a, b)


USER = UserAdapter(USERS_RECIPE, lora(USER_RANK, 1))
RAW = encode_user_adapter(LAYOUT, USER)
NAN = {MODULES[0].name: torch.full((USER_RANK, MODULES[0].h_in), torch.nan)}


def test_stacking_adds_the_users_delta_to_the_fused_one() -> None:
    fused = lora(RANK, 0)
    stacked = stack(fused, USER, torch.float32)
    assert stacked.rank == RANK + USER_RANK
    for module in fused.a:
        torch.testing.assert_close(stacked.delta(module), fused.delta(module) + USER.weights.delta(module))


def test_adapter_bytes_round_trip_and_cut_ones_are_refused() -> None:
    read = decode_user_adapter(LAYOUT, RAW)
    assert (read.recipe, read.weights.rank) == (USERS_RECIPE, USER_RANK)
    for name in USER.weights.a:
        torch.testing.assert_close(read.weights.a[name].float(), USER.weights.a[name])
        torch.testing.assert_close(read.weights.b[name].float(), USER.weights.b[name])
    assert encode_user_adapter(LAYOUT, UserAdapter(USERS_RECIPE, lora(USER_RANK, 1))) == RAW
    without_first = {name: b * (name != MODULES[0].name) for name, b in USER.weights.b.items()}
    upper = UserAdapter(USERS_RECIPE, replace(USER.weights, b=without_first))
    raw = encode_user_adapter(LAYOUT, upper)
    assert len(RAW) - len(raw) >= 2 * USER_RANK * (MODULES[0].h_in + MODULES[0].h_out) - 8
    fused, read = lora(RANK, 0), decode_user_adapter(LAYOUT, raw)
    for module in fused.a:
        torch.testing.assert_close(stack(fused, read).delta(module), stack(fused, upper).delta(module))
    for length in range(0, len(RAW), 7):
        with pytest.raises(UserAdapterError):
            decode_user_adapter(LAYOUT, RAW[:length])


OTHER_BANK = encode_user_adapter(RowLayout(MODULES[:1], RANK, shared_a=True), USER)
SPOILED = encode_user_adapter(
    LAYOUT, UserAdapter(USERS_RECIPE, replace(lora(USER_RANK, 1), a=lora(USER_RANK, 1).a | NAN))
)
CORE = save(  # of former versions
    {"c": torch.zeros(RANK * RANK * len(MODULES), dtype=torch.bfloat16)},
    {"mta-user-1": json.dumps({"kind": "core", "rank": RANK, "recipe": USERS_RECIPE})},
)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (OTHER_BANK, "but this bank needs"),
        (CORE, r"kind 'core'.*mta readapt"),
        (RAW.replace(b'first\\": 0', b'first\\":-1'), "but this bank needs"),
        (SPOILED, "not finite"),
        *((raw, f"{len(raw)} bytes cannot be read") for raw in (b"", b"\0" * 64, b"\xff" * 64)),
        (b'\x10\0\0\0\0\0\0\0{"__metadata__":', "24 bytes cannot be read"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(raw: bytes, message: str) -> None:
    with pytest.raises(UserAdapterError, match=message):
        decode_user_adapter(LAYOUT, raw)
