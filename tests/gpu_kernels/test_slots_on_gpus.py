"""vLLM's kernels for GPUs read from the slots that ours wrote what each adapter adds.

In float16, since Triton's interpreter does not know bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import pytest

pytest.importorskip("vllm")

import torch

from adapters.flat import FlatLora
from adapters.lora import ModuleShape
from server.engine.fusing.slots import FusedLoRAModel
from tests.gpu_kernels.interpreted import adapted, interpreter
from tests.unit.engine.test_slots import SLOTS, BareSlots, bare_layer

MODULES = tuple(ModuleShape(name, 40, h_out) for name, h_out in (("q", 48), ("k", 16)))
DTYPE, ROUNDING = torch.float16, 2**-10
BANKS = {"one": 1, "other": 2}  # seeds of their frozen A
MIXED = (0, 1, 1, -1, 0, 1, -1, 0, 0)  # the slots of a step's rows, of which two have no adapter


class Slots(BareSlots):
    """Of one layer, which has two modules."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        layer = bare_layer()
        layer.n_slices = len(MODULES)
        layer.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, rank, m.h_in, dtype=DTYPE) for m in MODULES)
        layer.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, m.h_out, rank, dtype=DTYPE) for m in MODULES)
        self.modules, self.packed_modules = {"qk": layer}, {"qk": [m.name for m in MODULES]}

    def bring_in(self, lora_id: int, *ranks: int, bank: str = "one", shares_a: bool = True) -> FlatLora:
        """Make an adapter with blocks of these ranks, serve it, and return it."""
        flat = adapter(lora_id, ranks, BANKS[bank] if shares_a else lora_id)
        names = {m.name: m.name for m in MODULES}
        self.add_adapter(FusedLoRAModel(lora_id, f"user {lora_id}", flat, names, bank=bank, shares_a=shares_a))
        self.activate_adapter(lora_id)
        return flat


def adapter(seed: int, ranks: Sequence[int], first_seed: int) -> FlatLora:
    first, numbers = (torch.Generator().manual_seed(each) for each in (first_seed, 1000 + seed))
    width = sum(m.h_in for m in MODULES)
    a = [torch.randn(r * width, generator=numbers if place else first).to(DTYPE) for place, r in enumerate(ranks)]
    b = torch.randn(sum(m.h_out for m in MODULES), sum(ranks), generator=numbers) / 8
    return FlatLora(MODULES, tuple(a), b.to(DTYPE))


@pytest.fixture(scope="module")
def kernels() -> Iterator[Executor]:
    with interpreter() as process:
        yield process


def check(
    kernels: Executor,
    slots: Slots,
    expected: Sequence[FlatLora | None],
    owners: Sequence[int] = MIXED,
    *,
    specialised: bool = False,
) -> None:
    """Compare what the kernels read with the dense formula; `expected` has each slot's adapter, None for zeros."""
    x = torch.randn(len(owners), MODULES[0].h_in, generator=torch.Generator().manual_seed(9)).to(DTYPE)
    layer = slots.modules["qk"]
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    read = kernels.submit(adapted, x, owners, *stacks, specialised=specialised).result()
    for row, owner, made in zip(x.double(), owners, read.double(), strict=True):
        flat = expected[owner] if owner >= 0 else None
        if flat is None:
            assert not made.any()
            continue
        weights = flat.weights()
        low = [(weights.b[m.name].double(), weights.a[m.name].double() @ row) for m in MODULES]
        wanted = torch.cat([b @ narrow for b, narrow in low])
        terms = torch.cat([b.abs() @ narrow.abs() for b, narrow in low])
        assert ((made - wanted).abs() <= ROUNDING * terms).all()


@pytest.mark.parametrize(("owners", "specialised"), [(MIXED, False), (MIXED, True), ((1,), True), ((-1, -1), False)])
def test_each_row_is_given_its_own_adapter(kernels: Executor, owners: Sequence[int], specialised: bool) -> None:
    slots = Slots(16)
    check(kernels, slots, [slots.bring_in(1, 8), slots.bring_in(2, 8)], owners, specialised=specialised)


@pytest.mark.parametrize(("room", "ranks"), [(16, (8, 2)), (16, (16,)), (32, (8, 8, 8)), (16, (5,))])
def test_ranks_and_blocks_are_read_whole(kernels: Executor, room: int, ranks: tuple[int, ...]) -> None:
    slots, shares_a = Slots(room), len(ranks) < 3
    served = [slots.bring_in(lora_id, *own, shares_a=shares_a) for lora_id, own in ((1, ranks), (2, ranks[:1]))]
    check(kernels, slots, served)


def test_a_slot_that_is_taken_over_keeps_nothing_of_before(kernels: Executor) -> None:
    slots = Slots(16)
    slots.bring_in(1, 8, 4)
    slots.bring_in(2, 8)
    check(kernels, slots, [slots.bring_in(3, 8), slots.bring_in(4, 4, bank="other")])
    check(kernels, slots, [slots.bring_in(5, 8, 2), slots.bring_in(6, 8)])


def test_a_wiped_slot_adds_nothing(kernels: Executor) -> None:
    slots = Slots(16)
    slots.bring_in(1, 8, 4)
    kept = slots.bring_in(2, 8)
    slots.remove_adapter(1)
    slots.wipe({"user 1"})
    check(kernels, slots, [None, kept])
