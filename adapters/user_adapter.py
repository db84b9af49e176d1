"""User adapters: the LoRA that few-shot training adds to one user's fused adapter, as a value and as bytes.

ΔW_user = B_u A_u, of rank R_u, is stacked beside the fused A [R, H_in] and B [H_out, R] of the recipe it was trained
on, to rank R + R_u. A user adapter is never served with another recipe. As bytes it is a safetensors file of two flat
bf16 tensors in the order of the bank's layout, with rank and recipe in its header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from adapters.errors import UserAdapterError, excerpt
from adapters.flat import FlatLora, flat_a, flat_b, lora_of
from adapters.lora import LoraWeights, RowLayout
from adapters.raw import USER_FORMAT

_LENGTH_BYTES = 8
_KIND = "lora"
"""In every header. There was another, `core`, which is no longer served: its users are adapted again."""


@dataclass(frozen=True, slots=True)
class UserAdapter:
    """A trained user adapter, and the name of the plain recipe it was trained on."""

    recipe: str
    weights: LoraWeights


def stack(fused: LoraWeights, user: UserAdapter, dtype: torch.dtype = torch.bfloat16) -> LoraWeights:
    """The adapter that serves the user, module by module; see `stack_flat`."""
    return stack_flat(FlatLora.of(fused), user, dtype).weights()


def stack_flat(fused: FlatLora, user: UserAdapter, dtype: torch.dtype = torch.bfloat16) -> FlatLora:
    """The adapter that serves the user: what their recipe stands for and their own LoRA together, as `dtype`."""
    own, modules = user.weights, fused.modules
    theirs = FlatLora.of(LoraWeights(own.rank, {m.name: own.a[m.name] for m in modules}, own.b))
    a = tuple(block.to(dtype) for block in (*fused.a, *theirs.a))
    return FlatLora(modules, a, torch.cat([fused.b.to(dtype), theirs.b.to(dtype)], dim=1))


def encode_user_adapter(layout: RowLayout, user: UserAdapter) -> bytes:
    """The bytes that the store keeps; weights are rounded to bf16."""
    tensors = {"a": flat_a(layout, user.weights), "b": flat_b(layout, user.weights)}
    header = {"kind": _KIND, "rank": user.weights.rank, "recipe": user.recipe}
    # One entry only: safetensors writes several in varying order, and equal adapters must have equal bytes.
    raw: bytes = save(
        {name: flat.to(torch.bfloat16) for name, flat in tensors.items()}, {USER_FORMAT: json.dumps(header)}
    )
    return raw


def decode_user_adapter(layout: RowLayout, raw: bytes) -> UserAdapter:
    """Read the bytes and check everything that serving relies on; UserAdapterError says what is wrong with them."""
    header = _header(raw)
    try:
        tensors = load(raw)
        kind, rank, recipe = header["kind"], int(header["rank"]), str(header["recipe"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserAdapterError(f"user adapter of {len(raw)} bytes cannot be read: {error}") from error
    if kind != _KIND:
        raise UserAdapterError(
            f"user adapter is of kind {excerpt(kind)}, but only {_KIND} is served: train it again (`mta readapt`)"
        )
    expected = {"a": rank * sum(m.h_in for m in layout.modules), "b": rank * sum(m.h_out for m in layout.modules)}
    found = {name: tensor.numel() for name, tensor in tensors.items()}
    if found != expected or rank < 1:
        raise UserAdapterError(f"user adapter of rank {rank} holds {found} numbers, but this bank needs {expected}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise UserAdapterError(f"user adapter of rank {rank} holds numbers that are not finite")
    return UserAdapter(recipe, lora_of(RowLayout(layout.modules, rank, shared_a=False), **tensors))


def _header(raw: bytes) -> dict[str, Any]:
    """Our entry in the metadata of safetensors bytes: the library reads it from files only."""
    size = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(json.loads(raw[_LENGTH_BYTES : _LENGTH_BYTES + size])["__metadata__"][USER_FORMAT])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserAdapterError(f"user adapter of {len(raw)} bytes has no readable header ({USER_FORMAT})") from error
    return header if isinstance(header, dict) else {}
