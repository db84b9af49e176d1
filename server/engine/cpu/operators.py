"""LoRA operators for CPUs: every row gets its own adapter, rows without one get nothing.

vLLM's own copy a whole A and B for every token, and take the -1 of a row without an adapter for an index: as soon as
one row of the step has an adapter, the others get whatever is in the last slot. Here a step's rows are sorted by
adapter once, and each layer is one call of a compiled kernel; where that cannot serve (types other than bfloat16, no
compiler), one dense product for each adapter does the same. All of it is tried out at start.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from bank.errors import BankError
from server.engine import patches
from server.engine.cpu.native import kernels
from server.settings import Settings

KNOWN_OPERATIONS = frozenset(
    {
        *("add_shrink", "add_expand", "add_lora_linear", "add_lora_embedding", "add_lora_logits"),
        "apply_lora_full_linear",  # skips rows without an adapter on its own
    }
)
"""The operations that vLLM's wrapper is known to have; any other could touch rows that it must not."""

UNKNOWN_RANK = 1 << 16
"""As many ranks as the slot has."""


Stacks = tuple[torch.Tensor, ...]
"""A or B of a layer's modules (q, k and v are one layer), each over all slots: [S, 1, rows, columns]."""


class SlotTable:
    """What the kernels know of each slot besides its weights."""

    def __init__(self, slots: int) -> None:
        self.ranks = np.full(slots, UNKNOWN_RANK, np.int32)  # [S]
        self.a_slots = np.arange(slots, dtype=np.int32)  # for each slot, the first one that holds the same A [S]
        self._a: list[Hashable] = list(range(slots))

    def note(self, slot: int, rank: int | None, same_a: Hashable = None) -> None:
        """Note a new tenant; `same_a` is equal for those that have the same A in every module, None for one's own."""
        self.ranks[slot] = UNKNOWN_RANK if rank is None else rank
        self._a[slot] = slot if same_a is None else same_a
        first: dict[Hashable, int] = {}
        self.a_slots[:] = [first.setdefault(of, index) for index, of in enumerate(self._a)]


@dataclass(frozen=True)  # no slots: `groups` is cached
class Rows:
    """The rows of a step that have an adapter, sorted by slot; all [n] int32."""

    places: torch.Tensor  # their indices among all rows
    slots: torch.Tensor  # the slot that holds their adapter
    a_slots: torch.Tensor  # a slot that holds their adapter's A, the same for all adapters that share it
    ranks: torch.Tensor  # of their adapter

    @classmethod
    def among(cls, slots: torch.Tensor, table: SlotTable) -> Rows:
        """Pick and sort them, given the slots of all rows [N], where -1 is no adapter."""
        of_all = slots.numpy(force=True)
        places = np.flatnonzero(of_all >= 0)
        places = places[np.argsort(of_all[places], kind="stable")]
        of = of_all[places]
        parts = (places.astype(np.int32), of.astype(np.int32), table.a_slots[of], table.ranks[of])
        return cls(*(torch.from_numpy(part) for part in parts))

    @classmethod
    def none(cls) -> Rows:
        empty = torch.empty(0, dtype=torch.int32)
        return cls(empty, empty, empty, empty)

    def __bool__(self) -> bool:
        return len(self.slots) > 0

    @cached_property
    def groups(self) -> list[tuple[int, int, torch.Tensor]]:
        """Each adapter of the step: its slot, its rank, the indices of its rows [m] int64; found once a step."""
        slots, counts = torch.unique_consecutive(self.slots, return_counts=True)
        ranks = self.ranks[counts.cumsum(0) - counts]
        places = torch.split(self.places.long(), counts.tolist())
        return list(zip(slots.tolist(), ranks.tolist(), places, strict=True))


class CpuLoRA(PunicaWrapperCPU):  # type: ignore[misc]
    """Arguments as in vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compiled = kernels(Settings().cache_dir)
        self._kernel = compiled.lora_linear_.default if compiled else None
        self._table: SlotTable | None = None
        self._tokens = self._samples = Rows.none()

    def watch(self, table: SlotTable) -> None:
        """Read from now on what each slot holds from a table that its writer keeps."""
        self._table = table

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **_: Any
    ) -> None:
        """Sort a step's rows by their adapters."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        if self._table is None:
            self._table = SlotTable(len(lora_index_to_id))
        self._tokens = Rows.among(self.token_lora_indices, self._table)
        self._samples = Rows.among(self.sampler_indices, self._table)

    def add_lora_linear(  # noqa: PLR0917  vLLM's signature
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Stacks,
        lora_b_stacked: Stacks,
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """y[:, slice i] += x A[i]ᵀ B[i]ᵀ · scale."""
        rows = self._tokens
        if not rows:
            return
        if (
            self._kernel is not None
            and scale == 1.0
            and y.dtype == x.dtype == lora_b_stacked[0].dtype == torch.bfloat16
        ):
            self._kernel(y, x, lora_a_stacked, lora_b_stacked, rows.places, rows.slots, rows.a_slots, rows.ranks)
            return
        slices = torch.split(_flat(y)[:, : sum(output_slices)], list(output_slices), dim=1)
        for part, a, b in zip(slices, lora_a_stacked, lora_b_stacked, strict=True):
            _add_products(part, x, a, b, scale=scale, rows=rows)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        """y += x Bᵀ."""
        for slot, rank, places in self._tokens.groups:
            _spread(_flat(y), places, _flat(x)[places, :rank], lora_b_stacked[slot, 0, :, :rank], add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **_: Any,
    ) -> None:
        """y += x Aᵀ Bᵀ · scale, for the rows that are sampled from."""
        _add_products(_flat(y), x, lora_a_stacked, lora_b_stacked, scale=scale, rows=self._samples)

    def add_shrink(self, *_: Any, **__: Any) -> None:
        """What vLLM calls only for LoRA that is itself cut in shares of the ranks: never here."""
        raise NotImplementedError("fully sharded LoRA on CPU: start the engine without --fully-sharded-loras")

    add_expand = add_shrink


def _add_products(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float, rows: Rows
) -> None:
    x = _flat(x)
    for slot, rank, places in rows.groups:
        low = scale * (x[places] @ a[slot, 0, :rank].t())
        _spread(y, places, low, b[slot, 0, :, :rank], add=True)


def _spread(y: torch.Tensor, places: torch.Tensor, low: torch.Tensor, b: torch.Tensor, add: bool) -> None:
    """y[places] = low Bᵀ, or added to what is there; vLLM may pad y."""
    outputs = (low.to(b.dtype) @ b.t()).to(y.dtype)
    width = min(outputs.shape[1], y.shape[1])
    if add:
        y[places, :width] += outputs[:, :width]
    else:
        y[places, :width] = outputs[:, :width]


def _flat(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(-1, rows.shape[-1])


def install() -> None:
    """Have CPUs use `CpuLoRA`, once it has been tried; raises as `check_operators` does."""
    check_operators()
    name = f"{CpuLoRA.__module__}.{CpuLoRA.__name__}"
    patches.replace(patches.CPU_OPERATORS, lambda original: classmethod(lambda platform: name))


def check_in_use(wrappers: Iterable[object]) -> None:
    """Make sure that a CPU's model runs with `CpuLoRA`; BankError when vLLM chose another class."""
    others = sorted({type(wrapper).__name__ for wrapper in wrappers if not isinstance(wrapper, CpuLoRA)})
    if others:
        raise BankError(f"LoRA would run on {', '.join(others)}, which gives rows each other's adapters: not served")


def check_operators(wrapper: type[PunicaWrapperCPU] = CpuLoRA) -> None:
    """Try every operation on a step of rows, some without adapters; BankError when one gets another row's adapter."""
    public = {name for name in vars(PunicaWrapperCPU) if not name.startswith("_")}
    if public != KNOWN_OPERATIONS:
        raise BankError(
            f"this vLLM's PunicaWrapperCPU differs in {sorted(public ^ KNOWN_OPERATIONS)} from the one known to keep "
            "adapters apart: install the version of vLLM that mta-server requires"
        )
    try:
        wrong = [name for name, good in _trial(wrapper).items() if not good]
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise BankError(f"this vLLM's LoRA operators for CPUs are not the ones the plugin knows: {error}") from error
    if wrong:
        raise BankError(f"{', '.join(wrong)} of this vLLM would give rows each other's adapters: it must not serve")


def _trial(wrapper_class: type[PunicaWrapperCPU]) -> dict[str, bool]:
    """Whether each operation leaves rows without an adapter as they are and gives the others their own."""
    numbers = torch.Generator().manual_seed(0)
    owners, slots = (0, 1, 0, 2, 0), (None, 0, None, 1, None)  # adapter ids (0: none) and their slots
    x, y, a, b = (torch.randn(*shape, generator=numbers) for shape in ((5, 4), (5, 6), (2, 1, 3, 4), (2, 1, 6, 3)))
    low, wanted = torch.ones(5, 3), y.clone()
    for row, slot in enumerate(slots):
        if slot is not None:
            low[row] = a[slot, 0] @ x[row]
            wanted[row] += b[slot, 0] @ low[row]
    wrapper = wrapper_class(8, max_batches=8, device=torch.device("cpu"))
    wrapper.update_metadata(LoRAMapping(owners, owners, is_prefill=True), [1, 2], 3, 16)
    linear, embedding, logits = y.clone(), y.clone(), y.clone()
    wrapper.add_lora_linear(linear, x, (a,), (b,), 1.0, (6,))
    wrapper.add_lora_embedding(embedding, low, b)
    wrapper.add_lora_logits(logits, x, a, b, 1.0)
    answers = {"add_lora_linear": linear, "add_lora_embedding": embedding, "add_lora_logits": logits}
    return {name: torch.allclose(answer, wanted, atol=1e-5) for name, answer in answers.items()}
