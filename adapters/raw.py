"""Read bf16 safetensors files, including user adapters, with numpy alone, for processes without torch.

File format: the header's length in 8 bytes, the header (JSON: dtype, shape and offsets by name, metadata), the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.errors import UserAdapterError, excerpt
from adapters.lora import RowLayout

USER_FORMAT = "mta-user-1"
"""Metadata key of user adapters; the value is JSON with kind, rank, recipe and the first module that has numbers."""
USER_KIND = "lora"
_LENGTH_BYTES = 8
_DTYPE = "BF16"
_EXPONENT = 0x7F80  # exponent bits of bf16; all are set only in infinities and NaN

Bits = npt.NDArray[np.uint16]  # bf16 numbers as raw bits: the upper half of the float32


def read_tensors(raw: npt.NDArray[np.uint8]) -> tuple[dict[str, Bits], dict[str, str]]:
    """Return the tensors, as views, and the metadata of a bf16 file; raise ValueError for any other content."""
    size = int.from_bytes(bytes(raw[:_LENGTH_BYTES]), "little")
    start = _LENGTH_BYTES + size
    if not 0 < size <= raw.size - _LENGTH_BYTES:
        raise ValueError("it is not a safetensors file")
    try:
        header = json.loads(bytes(raw[_LENGTH_BYTES:start]))
        metadata = header.pop("__metadata__", {})
        return {name: _cut(raw[start:], entry) for name, entry in header.items()}, metadata
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read: {error!r}") from error


def shapes_of(tensors: Mapping[str, Bits]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _cut(data: npt.NDArray[np.uint8], entry: Mapping[str, Any]) -> Bits:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] != _DTYPE or not 0 <= start <= stop <= data.size:
        raise ValueError(f"one of its tensors is not {_DTYPE}, or is incomplete")
    return data[start:stop].view(np.uint16).reshape(shape)


def read_user_adapter(layout: RowLayout, raw: bytes) -> tuple[str, int, dict[str, Bits]]:
    """Return a user adapter's recipe, rank R_u, and flat `a` and `b`; UserAdapterError if it cannot be served."""
    try:
        tensors, metadata = read_tensors(np.frombuffer(raw, np.uint8))
        header = json.loads(metadata[USER_FORMAT])
        kind, rank, recipe = header["kind"], int(header["rank"]), str(header["recipe"])
        first = int(header.get("first", 0))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserAdapterError(f"user adapter of {len(raw)} bytes cannot be read ({USER_FORMAT}): {error}") from error
    if kind != USER_KIND:
        raise UserAdapterError(
            f"user adapter is of kind {excerpt(kind)}, but only {USER_KIND} is served: train it again (`mta readapt`)"
        )
    sizes = {"a": [rank * m.h_in for m in layout.modules], "b": [rank * m.h_out for m in layout.modules]}
    expected = {name: (sum(each[first:]),) for name, each in sizes.items()}
    if (shapes := shapes_of(tensors)) != expected or rank < 1 or first < 0:
        raise UserAdapterError(f"user adapter of rank {rank} holds {shapes} numbers, but this bank needs {expected}")
    if any(((tensors[name] & _EXPONENT) == _EXPONENT).any() for name in expected):
        raise UserAdapterError(f"user adapter of rank {rank} holds numbers that are not finite")
    zeros = {name: np.zeros(sum(each[:first]), np.uint16) for name, each in sizes.items()}  # of the modules before
    return recipe, rank, {name: np.concatenate([zeros[name], tensors[name]]) for name in sizes}


def to_float(bits: Bits) -> npt.NDArray[np.float32]:
    """Convert bf16 to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(numbers: npt.NDArray[np.float32]) -> Bits:
    """Round finite float32 numbers to the nearest bf16, ties to even, as torch does."""
    wide = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def file_head(shapes: Iterable[tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the length and header of a bf16 file; the tensors' bytes must follow in this order, without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": _DTYPE, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _LENGTH_BYTES)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw
