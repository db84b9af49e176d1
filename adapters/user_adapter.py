"""User adapters: what few-shot training adds to one user's fused adapter, as a value and as bytes.

Two kinds, over the fused A [R, H_in] and B [H_out, R] of the recipe they were trained on::

    lora   ΔW_user = B_u A_u, rank R_u     stacked beside the fused A and B              rank R + R_u
    core   ΔW_user = B C A, C [R, R]       folded into B: B (1 + C), as in LoRA-XS       rank R

(`core`: Bałazy et al., "LoRA-XS", 2024, with the frozen pair taken from the fusion instead of from an SVD.) A user
adapter belongs to its recipe and is never served with another. As bytes it is a safetensors file of one or two flat
bf16 tensors in the order of the bank's layout, with kind, rank and recipe in its header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from adapters.errors import UserAdapterError
from adapters.flat import FlatLora, flat_a, flat_b, lora_of
from adapters.layout import RowLayout
from adapters.lora import LoraWeights
from adapters.raw import USER_FORMAT

_LENGTH_BYTES = 8


class UserAdapterKind(StrEnum):
    """What is trained (formulas above)."""

    LORA = "lora"
    CORE = "core"


@dataclass(frozen=True, slots=True)
class CoreWeights:
    """One R×R matrix per module, between the frozen fused A and B.

    Attributes:
        rank: R of the fused adapter.
        c: module name → C [R, R].
    """

    rank: int
    c: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class UserAdapter:
    """A trained user adapter.

    Attributes:
        recipe: name of the recipe it was trained on, without a user adapter.
        weights: what was trained.
    """

    recipe: str
    weights: LoraWeights | CoreWeights

    @property
    def kind(self) -> UserAdapterKind:
        """What its weights are: a LoRA or cores."""
        return UserAdapterKind.CORE if isinstance(self.weights, CoreWeights) else UserAdapterKind.LORA

    @property
    def added_rank(self) -> int:
        """R_u, what it adds to the fused adapter's rank when it is served."""
        return 0 if isinstance(self.weights, CoreWeights) else self.weights.rank


def stack(fused: LoraWeights, user: UserAdapter, dtype: torch.dtype = torch.bfloat16) -> LoraWeights:
    """The adapter that serves the user, module by module; see `stack_flat`."""
    return stack_flat(FlatLora.of(fused), user, dtype).weights()


def stack_flat(fused: FlatLora, user: UserAdapter, dtype: torch.dtype = torch.bfloat16) -> FlatLora:
    """The adapter that serves the user: the fused one and theirs together.

    Args:
        fused: what the recipe stands for; for a `core` in float32, so that it is rounded only here.
        user: trained on that recipe.
        dtype: of the result.
    """
    weights, modules = user.weights, fused.modules
    a = tuple(block.to(dtype) for block in fused.a)
    if isinstance(weights, CoreWeights):
        pieces = zip(modules, torch.split(fused.b.float(), [m.h_out for m in modules]), strict=True)
        b = torch.cat([piece + piece @ weights.c[m.name].float() for m, piece in pieces])
        return FlatLora(modules, a, b.to(dtype))
    theirs = FlatLora.of(LoraWeights(weights.rank, {m.name: weights.a[m.name] for m in modules}, weights.b))
    b = torch.cat([fused.b.to(dtype), theirs.b.to(dtype)], dim=1)
    return FlatLora(modules, (*a, theirs.a[0].to(dtype)), b)


def encode_user_adapter(layout: RowLayout, user: UserAdapter) -> bytes:
    """The bytes that the store keeps; weights are rounded to bf16."""
    weights = user.weights
    if isinstance(weights, CoreWeights):
        tensors = {"c": torch.cat([weights.c[m.name].float().reshape(-1) for m in layout.modules])}
    else:
        tensors = {"a": flat_a(layout, weights), "b": flat_b(layout, weights)}
    header = {"kind": user.kind.value, "rank": weights.rank, "recipe": user.recipe}
    # One entry only: safetensors writes several in varying order, and equal adapters must have equal bytes.
    raw: bytes = save(
        {name: flat.to(torch.bfloat16) for name, flat in tensors.items()}, {USER_FORMAT: json.dumps(header)}
    )
    return raw


def decode_user_adapter(layout: RowLayout, raw: bytes) -> UserAdapter:
    """Read the bytes of a user adapter and check everything that serving it relies on.

    Args:
        layout: of the bank that its recipe names.
        raw: what `encode_user_adapter` made.

    Raises:
        UserAdapterError: saying what is wrong with the bytes.
    """
    header = _header(raw)
    try:
        tensors = load(raw)
        kind, rank, recipe = UserAdapterKind(header["kind"]), int(header["rank"]), str(header["recipe"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserAdapterError(f"user adapter of {len(raw)} bytes cannot be read: {error}") from error
    r_in, r_out = sum(m.h_in for m in layout.modules), sum(m.h_out for m in layout.modules)
    core = kind is UserAdapterKind.CORE
    expected = {"c": rank * rank * len(layout.modules)} if core else {"a": rank * r_in, "b": rank * r_out}
    found = {name: tensor.numel() for name, tensor in tensors.items()}
    if found != expected or rank < 1:
        raise UserAdapterError(
            f"user adapter ({kind.value}, rank {rank}) holds {found} numbers, but this bank needs {expected}"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise UserAdapterError(f"user adapter ({kind.value}, rank {rank}) holds numbers that are not finite")
    if not core:
        return UserAdapter(recipe, lora_of(RowLayout(layout.modules, rank, shared_a=False), **tensors))
    cores = tensors["c"].float().view(len(layout.modules), rank, rank)
    return UserAdapter(recipe, CoreWeights(rank, {m.name: c for m, c in zip(layout.modules, cores, strict=True)}))


def _header(raw: bytes) -> dict[str, Any]:
    """Our entry in the metadata of safetensors bytes: the library reads it from files only."""
    size = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(json.loads(raw[_LENGTH_BYTES : _LENGTH_BYTES + size])["__metadata__"][USER_FORMAT])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserAdapterError(f"user adapter of {len(raw)} bytes has no readable header ({USER_FORMAT})") from error
    return header if isinstance(header, dict) else {}
