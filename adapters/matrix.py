"""The meta-LoRA matrix, mapped by all processes of a host: `rows` [N, D], or [N + 1, D] with the common row last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from adapters.errors import FusionError
from adapters.lora import RowLayout
from adapters.raw import file_head

PAGE_BYTES = 4096  # smallest memory page size
BF16_BYTES = 2
PACK_BLOCK = 1024  # int8 numbers that share a scale, as in `server/engine/cpu/lora.cpp`


@dataclass(frozen=True, slots=True)
class MetaMatrix:
    layout: RowLayout
    rows: torch.Tensor  # [N, D] or [N + 1, D] bf16, with the common row last
    anchors: int  # N, or the number of directions
    common: bool
    shared_a: torch.Tensor | None  # frozen A of all rows, [R·ΣH_in] bf16; only for method `shared`
    packed: tuple[torch.Tensor, torch.Tensor] | None = None  # [N, D] int8, and the scales of blocks, float32

    @classmethod
    def open(cls, path: Path, layout: RowLayout, anchors: int, common: bool) -> MetaMatrix:
        """Map a matrix file; raise FusionError if it cannot be read or its shape differs from the manifest."""
        try:
            with safe_open(path, framework="pt") as file:
                rows = file.get_tensor("rows")
                shared_a = file.get_tensor("shared_a") if layout.shared_a else None
        except (OSError, SafetensorError) as error:
            raise FusionError(f"cannot read the meta-LoRA matrix {path}: {error}") from error
        expected = (anchors + common, layout.row_numbers)
        if tuple(rows.shape) != expected or rows.dtype != torch.bfloat16:
            raise FusionError(
                f"{path} holds rows of shape {tuple(rows.shape)} and type {rows.dtype}, "
                f"but the manifest says {expected} in bfloat16"
            )
        if shared_a is not None and (numbers := shared_a.numel()) != layout.a_numbers:
            raise FusionError(f"{path}: shared_a has {numbers} numbers, but the layout says {layout.a_numbers}")
        return cls(layout, rows, anchors, common, shared_a)

    @property
    def frozen(self) -> torch.Tensor:
        """Return the frozen A of a `shared` bank, flat [R·ΣH_in]; raise FusionError if every row has its own A."""
        if self.shared_a is None:
            raise FusionError("method `shared` needs a bank with one frozen A")
        return self.shared_a

    def prepared(self, dtype: torch.dtype) -> MetaMatrix:
        """Return a matrix whose frozen A is already in `dtype`, so that fusions need not convert it."""
        return self if self.shared_a is None else replace(self, shared_a=self.shared_a.to(dtype))

    @property
    def common_index(self) -> int:
        """Return the index of the common row in `rows`; raise FusionError if the bank has no common row."""
        if not self.common:
            raise FusionError("the recipe asks for the common row (`c`), but this bank was built without one")
        return self.anchors

    def with_packed(self) -> MetaMatrix:
        """Return a matrix with all rows but the common one in int8 too, off by at most 1/254 of a block's largest."""
        width = self.rows.shape[1]
        numbers = torch.empty((self.anchors, width), dtype=torch.int8)
        scales = torch.empty(self.anchors, -(-width // PACK_BLOCK))
        for row, out, scale in zip(self.rows[: self.anchors], numbers, scales, strict=True):
            blocks = torch.nn.functional.pad(row.float(), (0, -width % PACK_BLOCK)).view(-1, PACK_BLOCK)
            torch.div(blocks.abs().amax(dim=1), 127, out=scale)
            divisors = torch.where(scale > 0, scale, 1)
            out.copy_((blocks / divisors[:, None]).round_().view(-1)[:width])
        return replace(self, packed=(numbers, scales))

    def touch(self) -> None:
        """Read every page of the rows into memory, so that no fusion waits for the disk."""
        self.rows.view(-1)[:: PAGE_BYTES // self.rows.element_size()].sum()


def write_matrix(
    path: Path, layout: RowLayout, count: int, rows: Iterable[torch.Tensor], shared_a: torch.Tensor | None = None
) -> None:
    """Write `count` bf16 rows [D], one by one (anchors in index order, then any common row), and any frozen A."""
    shapes: dict[str, tuple[int, ...]] = {"rows": (count, layout.row_numbers)}
    if layout.shared_a:
        if shared_a is None or shared_a.numel() != layout.a_numbers:
            raise FusionError(f"a shared layout needs one A of {layout.a_numbers} numbers")
        shapes["shared_a"] = (layout.a_numbers,)
    with path.open("wb") as file:
        file.write(file_head(shapes.items(), {}))
        for row in rows:
            if row.numel() != layout.row_numbers:
                raise FusionError(f"rows have {row.numel()} numbers, but the layout needs {layout.row_numbers}")
            file.write(stored(row))
        if layout.shared_a and shared_a is not None:
            file.write(stored(shared_a))


def stored(numbers: torch.Tensor) -> memoryview:
    """Return the bytes of numbers in a matrix file, bf16."""
    return numbers.to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy().data
