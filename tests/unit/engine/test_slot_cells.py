"""Writing over a slot in one call: the same numbers as module by module, wherever the tensors lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adapters.flat import FlatLora
from adapters.lora import ModuleShape
from server.engine.fusing.cells import Cells

SLOTS, ROOM = 3, 16
MODULES = tuple(ModuleShape(f"m{i}", 8 * (i + 1), 24 - 4 * i) for i in range(4))
Stacks = list[tuple[torch.Tensor, torch.Tensor]]


def apart(dtype: torch.dtype) -> Stacks:
    """Every module's tensors by themselves."""
    return [
        (torch.full((SLOTS, 1, ROOM, m.h_in), 7, dtype=dtype), torch.full((SLOTS, 1, m.h_out, ROOM), 7, dtype=dtype))
        for m in MODULES
    ]


def lying_across(dtype: torch.dtype) -> Stacks:
    """Every module's tensors by themselves, B along H_out."""
    return [(a, b.transpose(2, 3).contiguous().transpose(2, 3)) for a, b in apart(dtype)]


def adapter(ranks: tuple[int, ...], dtype: torch.dtype) -> FlatLora:
    generator = torch.Generator().manual_seed(sum(ranks))
    a = [torch.randn(rank * sum(m.h_in for m in MODULES), generator=generator).to(dtype) for rank in ranks]
    b = torch.randn(sum(m.h_out for m in MODULES), sum(ranks), generator=generator).to(dtype)
    return FlatLora(MODULES, tuple(a), b)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("stacks_of", [apart, lying_across])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [(8,), (5,), (8, 4), (8, 1), (6, 6), (16,), (1, 2, 3)])
def test_a_slot_holds_every_modules_matrices_and_zero_beside_them(
    stacks_of: Callable[[torch.dtype], Stacks], across: bool, dtype: torch.dtype, ranks: tuple[int, ...]
) -> None:
    stacks, flat = stacks_of(dtype), adapter(ranks, dtype)
    weights, rank = flat.weights(), sum(ranks)
    flat = flat.transposed() if across else flat
    Cells.of_slots(stacks, ranks, shares_a=True)[1].write(flat)
    for module, (a, b) in zip(MODULES, stacks, strict=True):
        assert torch.equal(a[1, 0, :rank], weights.a[module.name])
        assert torch.equal(b[1, 0, :, :rank], weights.b[module.name])
        assert not a[1, 0, rank:].any()
        assert not b[1, 0, :, rank:].any()
        for other in (0, 2):
            assert (a[other] == 7).all()
            assert (b[other] == 7).all()


def test_the_shared_a_is_written_unless_it_is_there() -> None:
    stacks, flat = apart(torch.bfloat16), adapter((8, 4), torch.bfloat16)
    cells = Cells.of_slots(stacks, (8, 4), shares_a=True)[0]
    cells.write(flat, has_shared_a=True, padding_is_zero=True)
    first, own = stacks[0][0][0, 0, :8], stacks[0][0][0, 0, 8:12]
    assert (first == 7).all()
    assert torch.equal(own, flat.a[1][: own.numel()].view(own.shape))
    cells.write(flat)
    assert torch.equal(first, flat.a[0][: first.numel()].view(first.shape))


def test_numbers_are_copied_as_wide_as_rows_and_slots_allow() -> None:
    runs = {ranks: Cells.of_slots(apart(torch.bfloat16), ranks, shares_a=True)[1].runs for ranks in ((8,), (5,))}
    assert [run.dtype for run in runs[8,]] == [torch.complex128, torch.complex128]
    assert [run.dtype for run in runs[5,]] == [torch.bfloat16, torch.complex128]


def test_bits_that_are_no_number_are_copied_as_they_are() -> None:
    """Wide types are only a way to copy: no pattern of bits may change."""
    stacks = apart(torch.bfloat16)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    rows = sum(m.h_out for m in MODULES)
    cells = Cells.of_slots(stacks, (8,), shares_a=True)[0]
    for chunk in torch.split(every, rows * 8):
        bits = torch.zeros(rows * 8, dtype=torch.uint16)
        bits[: len(chunk)] = chunk
        a = torch.zeros(8 * sum(m.h_in for m in MODULES), dtype=torch.bfloat16)
        cells.write(FlatLora(MODULES, (a,), bits.view(torch.bfloat16).view(rows, 8)))
        there = torch.cat([b[0, 0, :, :8].contiguous().view(torch.uint16).flatten() for _, b in stacks])
        assert torch.equal(there, bits)
