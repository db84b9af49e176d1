"""User adapters as values and as bytes: what they add, that bytes keep it, and that nothing else is read."""

from __future__ import annotations

import pytest
import torch

from adapters.errors import UserAdapterError
from adapters.layout import RowLayout
from adapters.lora import LoraWeights, ModuleShape
from adapters.user_adapter import (
    CoreWeights,
    UserAdapter,
    UserAdapterKind,
    decode_user_adapter,
    encode_user_adapter,
    stack,
)

MODULES = (ModuleShape("layers.0.q_proj", 12, 8), ModuleShape("layers.0.down_proj", 20, 12))
RANK, USER_RANK = 4, 2
LAYOUT = RowLayout(MODULES, RANK, shared_a=True)
RECIPE = "mta1:9f2c41d0:shared:c+a03*286"


def lora(rank: int, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)

    def rounded(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).float()

    return LoraWeights(
        rank, {m.name: rounded(rank, m.h_in) for m in MODULES}, {m.name: rounded(m.h_out, rank) for m in MODULES}
    )


def user(kind: UserAdapterKind, seed: int = 1) -> UserAdapter:
    if kind is UserAdapterKind.LORA:
        return UserAdapter(RECIPE, lora(USER_RANK, seed))
    generator = torch.Generator().manual_seed(seed)
    c = {m.name: torch.randn(RANK, RANK, generator=generator).to(torch.bfloat16).float() for m in MODULES}
    return UserAdapter(RECIPE, CoreWeights(RANK, c))


def delta_of(fused: LoraWeights, adapter: UserAdapter, module: str) -> torch.Tensor:
    """ΔW_user [H_out, H_in] by its formula, dense."""
    weights = adapter.weights
    if isinstance(weights, CoreWeights):
        return fused.b[module] @ weights.c[module] @ fused.a[module]
    return weights.delta(module)


@pytest.mark.parametrize("kind", list(UserAdapterKind))
def test_stacking_adds_the_users_delta_to_the_fused_one(kind: UserAdapterKind) -> None:
    fused, adapter = lora(RANK, 0), user(kind)
    stacked = stack(fused, adapter, torch.float32)
    assert stacked.rank == RANK + adapter.added_rank
    for module in fused.a:
        expected = fused.delta(module) + delta_of(fused, adapter, module)
        torch.testing.assert_close(stacked.delta(module), expected)


@pytest.mark.parametrize("kind", list(UserAdapterKind))
def test_bytes_keep_everything(kind: UserAdapterKind) -> None:
    adapter = user(kind)
    read = decode_user_adapter(LAYOUT, encode_user_adapter(LAYOUT, adapter))
    assert (read.kind, read.recipe, read.added_rank) == (kind, RECIPE, adapter.added_rank)
    fused = lora(RANK, 0)
    for module in fused.a:
        torch.testing.assert_close(delta_of(fused, read, module).float(), delta_of(fused, adapter, module))


def test_a_core_takes_two_bytes_for_each_of_its_numbers_and_a_short_header() -> None:
    size = len(encode_user_adapter(LAYOUT, user(UserAdapterKind.CORE)))
    numbers = 2 * RANK * RANK * len(MODULES)
    assert numbers < size < numbers + 400


@pytest.mark.parametrize("kind", list(UserAdapterKind))
def test_equal_adapters_have_equal_bytes(kind: UserAdapterKind) -> None:
    assert encode_user_adapter(LAYOUT, user(kind)) == encode_user_adapter(LAYOUT, user(kind))


@pytest.mark.parametrize("kind", list(UserAdapterKind))
def test_bytes_cut_anywhere_are_refused(kind: UserAdapterKind) -> None:
    raw = encode_user_adapter(LAYOUT, user(kind))
    for length in range(0, len(raw), 7):
        with pytest.raises(UserAdapterError):
            decode_user_adapter(LAYOUT, raw[:length])


@pytest.mark.parametrize("kind", list(UserAdapterKind))
def test_an_adapter_of_another_bank_is_refused_with_both_sizes(kind: UserAdapterKind) -> None:
    raw = encode_user_adapter(LAYOUT, user(kind))
    other = RowLayout((*MODULES, ModuleShape("layers.1.q_proj", 12, 8)), RANK, shared_a=True)
    with pytest.raises(UserAdapterError, match="but this bank needs"):
        decode_user_adapter(other, raw)


def test_numbers_that_are_not_finite_are_refused() -> None:
    adapter = user(UserAdapterKind.CORE)
    assert isinstance(adapter.weights, CoreWeights)
    adapter.weights.c[MODULES[0].name][0, 0] = float("nan")
    with pytest.raises(UserAdapterError, match="not finite"):
        decode_user_adapter(LAYOUT, encode_user_adapter(LAYOUT, adapter))


@pytest.mark.parametrize("raw", [b"", b"\0" * 64, b"\xff" * 64, b'\x10\0\0\0\0\0\0\0{"__metadata__":'])
def test_what_is_no_adapter_is_refused(raw: bytes) -> None:
    with pytest.raises(UserAdapterError, match=f"{len(raw)} bytes has no readable header"):
        decode_user_adapter(LAYOUT, raw)
