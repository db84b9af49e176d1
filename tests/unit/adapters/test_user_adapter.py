"""User adapters as values and as bytes: what they add, that bytes keep it, and that nothing else is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from adapters.errors import UserAdapterError
from adapters.lora import LoraWeights, ModuleShape, RowLayout
from adapters.user_adapter import UserAdapter, decode_user_adapter, encode_user_adapter, stack

MODULES = (ModuleShape("layers.0.q_proj", 12, 8), ModuleShape("layers.0.down_proj", 20, 12))
RANK, USER_RANK = 4, 2
LAYOUT = RowLayout(MODULES, RANK, shared_a=True)
RECIPE = "mta3:9f2c41d0:shared:c+a03*286"


def lora(rank: int, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)

    def rounded(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).float()

    return LoraWeights(
        rank, {m.name: rounded(rank, m.h_in) for m in MODULES}, {m.name: rounded(m.h_out, rank) for m in MODULES}
    )


def user(seed: int = 1) -> UserAdapter:
    return UserAdapter(RECIPE, lora(USER_RANK, seed))


def test_stacking_adds_the_users_delta_to_the_fused_one() -> None:
    fused, adapter = lora(RANK, 0), user()
    stacked = stack(fused, adapter, torch.float32)
    assert stacked.rank == RANK + USER_RANK
    for module in fused.a:
        torch.testing.assert_close(stacked.delta(module), fused.delta(module) + adapter.weights.delta(module))


def test_bytes_keep_everything_and_equal_adapters_have_equal_ones() -> None:
    adapter, raw = user(), encode_user_adapter(LAYOUT, user())
    read = decode_user_adapter(LAYOUT, raw)
    assert (read.recipe, read.weights.rank) == (RECIPE, USER_RANK)
    for name in adapter.weights.a:
        torch.testing.assert_close(read.weights.a[name].float(), adapter.weights.a[name])
        torch.testing.assert_close(read.weights.b[name].float(), adapter.weights.b[name])
    assert encode_user_adapter(LAYOUT, adapter) == raw


def test_bytes_cut_anywhere_are_refused() -> None:
    raw = encode_user_adapter(LAYOUT, user())
    for length in range(0, len(raw), 7):
        with pytest.raises(UserAdapterError):
            decode_user_adapter(LAYOUT, raw[:length])


def test_an_adapter_of_another_bank_is_refused_with_both_sizes() -> None:
    other = RowLayout((*MODULES, ModuleShape("layers.1.q_proj", 12, 8)), RANK, shared_a=True)
    with pytest.raises(UserAdapterError, match="but this bank needs"):
        decode_user_adapter(other, encode_user_adapter(LAYOUT, user()))


def test_a_core_of_former_versions_is_refused_with_the_remedy() -> None:
    header = {"mta-user-1": json.dumps({"kind": "core", "rank": RANK, "recipe": RECIPE})}
    raw = save({"c": torch.zeros(RANK * RANK * len(MODULES), dtype=torch.bfloat16)}, header)
    with pytest.raises(UserAdapterError, match=r"kind 'core'.*mta readapt"):
        decode_user_adapter(LAYOUT, raw)


def test_numbers_that_are_not_finite_are_refused() -> None:
    adapter = user()
    adapter.weights.a[MODULES[0].name][0, 0] = float("nan")
    with pytest.raises(UserAdapterError, match="not finite"):
        decode_user_adapter(LAYOUT, encode_user_adapter(LAYOUT, adapter))


@pytest.mark.parametrize("raw", [b"", b"\0" * 64, b"\xff" * 64, b'\x10\0\0\0\0\0\0\0{"__metadata__":'])
def test_what_is_no_adapter_is_refused(raw: bytes) -> None:
    with pytest.raises(UserAdapterError, match=f"{len(raw)} bytes cannot be read"):
        decode_user_adapter(LAYOUT, raw)
