"""Random user adapters without training, in the place where an engine looks for them."""

from __future__ import annotations

import hashlib

import redis
import torch

from adapters.lora import LoraWeights
from adapters.recipe import FusionRecipe
from adapters.user_adapter import UserAdapter, encode_user_adapter
from bank.manifest import BankManifest


def random_user_adapter(
    manifest: BankManifest, recipe: FusionRecipe, *, rank: int = 2, scale: float = 0.2
) -> UserAdapter:
    """Create a random user adapter for a recipe, rounded to bf16; `scale` is the standard deviation of its numbers."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16).float()

    modules = manifest.layout.modules
    a = {m.name: random(rank, m.h_in) for m in modules}
    b = {m.name: random(m.h_out, rank) for m in modules}
    return UserAdapter(recipe.plain.name, LoraWeights(rank, a, b))


def keep_user_adapter(
    redis_url: str, recipe: FusionRecipe, user: UserAdapter, manifest: BankManifest, **changes: str | bytes
) -> None:
    """Store an adapter as promotion does, for the user named by the recipe; `changes` override fields."""
    adapter = recipe.user_adapter
    assert adapter is not None
    raw = encode_user_adapter(manifest.layout, user)
    fields = {"id": adapter.id, "recipe": user.recipe, "sha256": hashlib.sha256(raw).hexdigest(), "raw": raw}
    with redis.Redis.from_url(redis_url) as client:
        client.hset(f"mta:{{{adapter.user_key}}}:adapter", mapping=fields | changes)
