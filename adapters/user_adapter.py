"""User adapters: the LoRA that few-shot training adds to one user's fused adapter, and its serialisation.

ΔW_user = B_u A_u, of rank R_u, is stacked on A and B of the recipe it was trained on, and served only with that recipe.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import save

from adapters.flat import FlatLora, flattened, lora_of
from adapters.lora import LoraWeights, RowLayout
from adapters.raw import USER_FORMAT, USER_KIND, read_tensors, read_user_adapter


@dataclass(frozen=True, slots=True)
class UserAdapter:
    """A trained user adapter, with the name of the plain recipe it was trained on."""

    recipe: str
    weights: LoraWeights


def stack(fused: LoraWeights, user: UserAdapter, dtype: torch.dtype = torch.bfloat16) -> LoraWeights:
    """Return the result of `stack_flat` per module."""
    return stack_flat(FlatLora.of(fused), user, dtype).weights()


def stack_flat(fused: FlatLora, user: UserAdapter, dtype: torch.dtype = torch.bfloat16) -> FlatLora:
    """Combine the user's fused adapter and their own LoRA into one adapter of rank R + R_u."""
    own, modules = user.weights, fused.modules
    theirs = FlatLora.of(LoraWeights(own.rank, {m.name: own.a[m.name] for m in modules}, own.b))
    a = tuple(block.to(dtype) for block in (*fused.a, *theirs.a))
    return FlatLora(modules, a, torch.cat([fused.b.to(dtype), theirs.b.to(dtype)], dim=1))


def encode_user_adapter(layout: RowLayout, user: UserAdapter, samples: Collection[str] = ()) -> bytes:
    """Serialise a user adapter in bf16, from the first module that it changes on, with the hashes of its samples."""
    first = next((position for position, module in enumerate(layout.modules) if user.weights.b[module.name].any()), 0)
    changed = replace(layout, modules=layout.modules[first:])
    weights = {"a": flattened(changed, user.weights.a).bfloat16(), "b": flattened(changed, user.weights.b).bfloat16()}
    about = {"kind": USER_KIND, "rank": user.weights.rank, "recipe": user.recipe, "first": first}
    header = json.dumps(about | {"samples": " ".join(sorted(samples))})
    # Use a single entry: safetensors writes several in varying order, but equal adapters must have equal bytes.
    raw: bytes = save(weights, {USER_FORMAT: header})
    return raw


def decode_user_adapter(layout: RowLayout, raw: bytes) -> UserAdapter:
    recipe, rank, tensors = read_user_adapter(layout, raw)
    a, b = (torch.from_numpy(tensors[name]).view(torch.bfloat16) for name in ("a", "b"))
    return UserAdapter(recipe, lora_of(RowLayout(layout.modules, rank, shared_a=False), a, b))


def samples_of(raw: bytes) -> frozenset[str]:
    """Return the hashes of the samples that a user adapter was trained on; none if its version noted none."""
    _, metadata = read_tensors(np.frombuffer(raw, np.uint8))
    return frozenset(json.loads(metadata[USER_FORMAT]).get("samples", "").split())
