"""vLLM's seam for LoRA operators, on CPU: every row gets its own adapter, rows without one get nothing.

vLLM's own wrapper copies a whole A and B for every token, and takes the -1 of a row without an adapter for an index:
as soon as one row of the step has an adapter, the others get whatever is in the last slot. Here a step's rows are
sorted by adapter once, and each layer is one call of a compiled kernel; where that cannot serve (types other than
bfloat16, no compiler), one dense product for each adapter does the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from server.engine.fusing.kernels.native import kernels
from server.engine.fusing.kernels.rows import Rows, SlotTable
from server.settings import Settings

Stacks = tuple[torch.Tensor, ...]
"""A or B of a layer's modules (q, k and v are one layer), each over all slots: [S, 1, rows, columns]."""


class CpuLoRA(PunicaWrapperCPU):  # type: ignore[misc]
    """LoRA operators for CPUs; arguments as in vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compiled = kernels(Settings().cache_dir)
        self._kernel = compiled and compiled.lora_linear
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
        low = [_zeros(x, a.shape[2]) for a in lora_a_stacked]
        self.add_shrink(low, x, lora_a_stacked, scale)
        self.add_expand(y, low, lora_b_stacked, output_slices)

    def add_shrink(self, y: Any, x: torch.Tensor, lora_a_stacked: Stacks, scale: float, **_: Any) -> None:
        """y[i] = x A[i]ᵀ · scale."""
        x = _flat(x)
        for low, a in zip(y, lora_a_stacked, strict=False):
            for slot, rank, places in self._tokens.groups:
                _flat(low)[places, :rank] = (scale * (x[places] @ a[slot, 0, :rank].t())).to(low.dtype)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: Stacks,
        output_slices: tuple[int, ...],
        *,
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        """y[:, slice i] += x[i] B[i]ᵀ."""
        y = _flat(y)
        for low, b, size in zip(x, lora_b_stacked, output_slices, strict=False):
            part = y[:, offset_start : offset_start + size]
            for slot, rank, places in self._tokens.groups:
                _spread(part, places, _flat(low)[places, :rank], b[slot, 0, :, :rank], add_inputs)
            offset_start += size

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
        x = _flat(x)
        for slot, rank, places in self._samples.groups:
            low = scale * (x[places] @ lora_a_stacked[slot, 0, :rank].t())
            _spread(_flat(y), places, low, lora_b_stacked[slot, 0, :, :rank], add=True)


def transpose_stacks(modules: Iterable[Any]) -> None:
    """Have every layer's B lie transposed in memory, [S, 1, R, H_out], behind tensors of the shape that vLLM knows.

    Along H_out the kernel reads and writes contiguous memory, whatever the rank. Called once, when slots are empty.
    """
    for module in modules:
        stacks = module.lora_b_stacked
        if isinstance(stacks, tuple):
            module.lora_b_stacked = tuple(_zeros_transposed(stack) if stack.dim() == 4 else stack for stack in stacks)


def _zeros_transposed(like: torch.Tensor) -> torch.Tensor:
    slots, one, h_out, rank = like.shape
    return torch.zeros(slots, one, rank, h_out, dtype=like.dtype, device=like.device).transpose(2, 3)


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


def _zeros(x: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.zeros(len(x), rank, dtype=torch.float32, device=x.device)
