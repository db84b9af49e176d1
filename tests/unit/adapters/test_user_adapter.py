"""User adapters as values and as bytes: what they add, that bytes keep it, and that nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace

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

    a, b = ({m.name: rounded(rank, m.h_in) for m in MODULES}, {m.name: rounded(m.h_out, rank) for m in MODULES})
    return LoraWeights(rank, a, b)


USER = UserAdapter(RECIPE, lora(USER_RANK, 1))
RAW = encode_user_adapter(LAYOUT, USER)
NAN = {MODULES[0].name: torch.full((USER_RANK, MODULES[0].h_in), torch.nan)}


def test_stacking_adds_the_users_delta_to_the_fused_one() -> None:
    fused = lora(RANK, 0)
    stacked = stack(fused, USER, torch.float32)
    assert stacked.rank == RANK + USER_RANK
    for module in fused.a:
        torch.testing.assert_close(stacked.delta(module), fused.delta(module) + USER.weights.delta(module))


def test_bytes_keep_everything_and_equal_adapters_have_equal_ones() -> None:
    read = decode_user_adapter(LAYOUT, RAW)
    assert (read.recipe, read.weights.rank) == (RECIPE, USER_RANK)
    for name in USER.weights.a:
        torch.testing.assert_close(read.weights.a[name].float(), USER.weights.a[name])
        torch.testing.assert_close(read.weights.b[name].float(), USER.weights.b[name])
    assert encode_user_adapter(LAYOUT, UserAdapter(RECIPE, lora(USER_RANK, 1))) == RAW


def test_bytes_cut_anywhere_are_refused() -> None:
    for length in range(0, len(RAW), 7):
        with pytest.raises(UserAdapterError):
            decode_user_adapter(LAYOUT, RAW[:length])


OTHER_BANK = encode_user_adapter(RowLayout(MODULES[:1], RANK, shared_a=True), USER)
SPOILED = encode_user_adapter(LAYOUT, UserAdapter(RECIPE, replace(lora(USER_RANK, 1), a=lora(USER_RANK, 1).a | NAN)))
CORE = save(  # of former versions
    {"c": torch.zeros(RANK * RANK * len(MODULES), dtype=torch.bfloat16)},
    {"mta-user-1": json.dumps({"kind": "core", "rank": RANK, "recipe": RECIPE})},
)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (OTHER_BANK, "but this bank needs"),
        (CORE, r"kind 'core'.*mta readapt"),
        (SPOILED, "not finite"),
        *((raw, f"{len(raw)} bytes cannot be read") for raw in (b"", b"\0" * 64, b"\xff" * 64)),
        (b'\x10\0\0\0\0\0\0\0{"__metadata__":', "24 bytes cannot be read"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(raw: bytes, message: str) -> None:
    with pytest.raises(UserAdapterError, match=message):
        decode_user_adapter(LAYOUT, raw)
