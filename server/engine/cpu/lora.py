"""LoRA operators for CPUs: vLLM's copy a whole A and B per token, and read a row's -1 (no adapter) as the last slot.

Here a step's rows are sorted by adapter once, and each layer takes one call of a compiled kernel. Without a compiler,
or for dtypes other than bfloat16, each layer takes one dense product per adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from bank.errors import BankError
from server.engine import patches
from server.engine.cpu.native import kernels
from server.engine.fusing.slots import SlotContent
from server.settings import Settings

UNKNOWN_RANK = 1 << 16  # use all ranks of the slot

Stacks = tuple[torch.Tensor, ...]  # A or B [S, 1, rows, columns] for each module of a layer (q, k and v are one layer)


class SlotTable:
    """Data about each slot, besides its weights, that the kernels need; both arrays are [S] int32."""

    def __init__(self, contents: Sequence[SlotContent]) -> None:
        first: dict[str | int, int] = {}
        a_slots = [first.setdefault(content.shared_a_key or slot, slot) for slot, content in enumerate(contents)]
        self.a_slots = np.array(a_slots, np.int32)  # the first slot with the same A
        self.ranks = np.array([content.rank or UNKNOWN_RANK for content in contents], np.int32)


@dataclass(frozen=True)  # without slots, because `groups` is cached
class Rows:
    """The rows of a step that have an adapter, sorted by slot; all tensors are [n] int32."""

    needed: int  # number of rows that a layer must have
    indices: torch.Tensor  # index among all rows
    slots: torch.Tensor  # slot with the row's adapter
    a_slots: torch.Tensor  # slot with the adapter's A, equal for all adapters that share it
    ranks: torch.Tensor  # rank of the adapter

    @classmethod
    def from_slots(cls, slots: torch.Tensor, table: SlotTable) -> Rows | None:
        """Select rows by the slots of all rows [N], where -1 means no adapter; return None if no row has one."""
        row_slots = slots.numpy(force=True)
        indices = np.flatnonzero(row_slots >= 0)
        if not len(indices):
            return None
        needed = int(indices[-1]) + 1
        indices = indices[np.argsort(row_slots[indices], kind="stable")]
        chosen = row_slots[indices]
        parts = (indices.astype(np.int32), chosen.astype(np.int32), table.a_slots[chosen], table.ranks[chosen])
        return cls(needed, *map(torch.from_numpy, parts))

    @property
    def for_kernel(self) -> tuple[torch.Tensor | int, ...]:
        return self.indices, self.slots, self.a_slots, self.ranks, self.needed

    @cached_property
    def groups(self) -> list[tuple[int, int, torch.Tensor]]:
        """Return slot, rank and row indices ([m] int64) of each adapter of the step."""
        slots, counts = torch.unique_consecutive(self.slots, return_counts=True)
        ranks = self.ranks[counts.cumsum(0) - counts]
        indices = torch.split(self.indices.long(), counts.tolist())
        return list(zip(slots.tolist(), ranks.tolist(), indices, strict=True))


class CpuLoRA(PunicaWrapperCPU):  # type: ignore[misc]
    table: SlotTable  # set by `CpuSlots`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compiled = kernels(Settings().cache_dir)
        self._kernel = compiled.lora_linear_.default if compiled else None
        self.tokens: Rows | None = None  # of the step, by token
        self._samples: Rows | None = None

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **_: Any
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.tokens = Rows.from_slots(self.token_lora_indices, self.table)
        self._samples = Rows.from_slots(self.sampler_indices, self.table)

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
        rows = self.tokens
        if rows is None:
            return
        all_bf16 = y.dtype == x.dtype == lora_b_stacked[0].dtype == torch.bfloat16
        if self._kernel is not None and scale == 1.0 and all_bf16:
            self._kernel(y, x, lora_a_stacked, lora_b_stacked, *rows.for_kernel)
            return
        slices = torch.split(_flat(y)[:, : sum(output_slices)], list(output_slices), dim=1)
        for part, a, b in zip(slices, lora_a_stacked, lora_b_stacked, strict=True):
            _add_products(part, x, a, b, scale=scale, rows=rows)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **_: Any,
    ) -> None:
        """y += x Aᵀ Bᵀ · scale, for the rows that are sampled."""
        if self._samples:
            _add_products(_flat(y), x, lora_a_stacked, lora_b_stacked, scale=scale, rows=self._samples)

    def add_shrink(self, *_: Any, **__: Any) -> None:
        """Reject the call: vLLM uses these operations only for fully sharded LoRAs and for embeddings."""
        raise NotImplementedError(
            "fully sharded LoRAs and LoRAs of embeddings are not supported: do not pass --fully-sharded-loras"
        )

    add_expand = add_lora_embedding = add_shrink


def _add_products(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float, rows: Rows
) -> None:
    """Add each adapter's product to its rows of y, which vLLM may have padded."""
    x = _flat(x)
    for slot, rank, indices in rows.groups:
        low = scale * (x[indices] @ a[slot, 0, :rank].t())
        outputs = (low.to(b.dtype) @ b[slot, 0, :, :rank].t()).to(y.dtype)
        width = min(outputs.shape[1], y.shape[1])
        y[indices, :width] += outputs[:, :width]


def _flat(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(-1, rows.shape[-1])


def install() -> None:
    """Make vLLM use `CpuLoRA` on CPUs; raise BankError if vLLM has an unknown operation, which could mix adapters."""
    known = {*vars(CpuLoRA), "apply_lora_full_linear"}  # this one already skips rows without an adapter
    unknown = sorted(name for name in {*vars(PunicaWrapperCPU)} - known if not name.startswith("_"))
    if unknown:
        raise BankError(
            f"PunicaWrapperCPU of this vLLM has {unknown}, which may mix up adapters: install the version of vLLM "
            "that mta-server requires"
        )
    name = f"{CpuLoRA.__module__}.{CpuLoRA.__name__}"
    patches.replace(patches.CPU_OPERATORS, lambda original: classmethod(lambda platform: name))
