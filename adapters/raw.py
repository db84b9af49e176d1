"""bf16 tensors of safetensors files in plain numpy, for processes without torch.

A file is eight bytes that say how long its header is, the header (JSON: name → dtype, shape, place; and metadata), and
the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

USER_FORMAT = "mta-user-1"
"""Under which name user adapters have an entry of their own in the metadata (`adapters/user_adapter.py`)."""

_LENGTH_BYTES = 8
_DTYPE = "BF16"

Bits = npt.NDArray[np.uint16]
"""Numbers in bf16: the upper half of their float32."""


class RawTensors:
    """The tensors of a file of bf16 alone, from its bytes, mapped or not; ValueError when they are not such a file."""

    def __init__(self, raw: npt.NDArray[np.uint8]) -> None:
        size = int.from_bytes(bytes(raw[:_LENGTH_BYTES]), "little")
        start = _LENGTH_BYTES + size
        if not 0 < size <= raw.size - _LENGTH_BYTES:
            raise ValueError("it is not a safetensors file")
        try:
            header = json.loads(bytes(raw[_LENGTH_BYTES:start]))
            self.metadata: Mapping[str, str] = header.pop("__metadata__", {})
            self._tensors = {name: _cut(raw[start:], entry) for name, entry in header.items()}
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header cannot be read: {error!r}") from error

    @classmethod
    def open(cls, path: Path) -> RawTensors:
        """Map a file; OSError or ValueError when there is none that can be read."""
        return cls(np.memmap(path, np.uint8, "r"))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Bits:
        return self._tensors[name]


def _cut(data: npt.NDArray[np.uint8], entry: Mapping[str, Any]) -> Bits:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] != _DTYPE or not 0 <= start <= stop <= data.size:
        raise ValueError(f"a tensor of it is not {_DTYPE}, or incomplete")
    return data[start:stop].view(np.uint16).reshape(shape)


def to_float(bits: Bits) -> npt.NDArray[np.float32]:
    """bf16 as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(numbers: npt.NDArray[np.float32]) -> Bits:
    """float32 rounded to bf16, to the nearest, ties to even, as torch does; the numbers are finite."""
    wide = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def file_head(shapes: Iterable[tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a file of tensors of these names and shapes begins with; their bytes follow in this order, without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, shape in shapes:
        end = place + 2 * int(np.prod(shape))
        header[name] = {"dtype": _DTYPE, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _LENGTH_BYTES)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw
