"""Operators of a model on CPUs: one in C++ each, instead of several small ones and the Python between them.

Norms are vLLM's own: it leaves them to its compiler, which is off, so that a norm took ten operations of PyTorch.
Linear layers are `linear` in lora.cpp, which adds the adapters in the same call, except where oneDNN has AMX. Without
AMX it is as fast as oneDNN for many rows and faster for few; without bf16 instructions three times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.nn import Parameter

from server.engine import patches
from server.engine.cpu.native import kernels
from server.settings import Settings

LANES = 16  # outputs side by side in packed weights, as in lora.cpp
FEW = 32  # rows up to which `linear` also adds adapters
_NO_ROWS = (*(torch.empty(0, dtype=torch.int32),) * 4, 0)


def install() -> None:
    patches.replace(patches.CPU_NORM, with_one_norm)
    patches.replace(patches.CPU_LINEAR, with_packed_weights)
    patches.replace(patches.CPU_LORA_LINEAR, with_adapters_in_one_call)


def with_one_norm(forward: Callable[..., Any]) -> Callable[..., Any]:
    def norm(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        weight = self.weight.data if self.has_weight else None
        alike = weight is None or weight.dtype == x.dtype
        if self.variance_size_override is not None or not alike or not x.is_contiguous():
            return forward(self, x, residual)
        if residual is None:
            normed = torch.empty_like(x)
            torch.ops._C.rms_norm(normed, x, weight, self.variance_epsilon)
            return normed
        torch.ops._C.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)
        return x, residual

    return norm


def with_packed_weights(choose: Callable[..., None]) -> Callable[..., None]:
    """Keep a layer's weights as `linear` reads them, in place of oneDNN's copy."""

    def choose_or_pack(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        fits = weight.dim() == 2 and weight.dtype == torch.bfloat16
        if linear() is None or not fits or weight.shape[0] % LANES or weight.shape[1] % 2:
            choose(layer, remove_weight)
            return
        layer.packed = packed = pack(weight.data)
        layer.cpu_linear = lambda x, weight, bias: multiplied(x, packed, bias)
        if remove_weight:
            layer.weight = Parameter(weight.new_empty(0), requires_grad=False)

    return choose_or_pack


def with_adapters_in_one_call(apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def apply_packed(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed, rows = self.base_layer.__dict__.get("packed"), self.punica_wrapper.tokens
        if packed is None or rows is None or x.dim() != 2 or len(x) > FEW:
            return apply(self, x, bias)
        return multiplied(x, packed, bias, (self.lora_a_stacked, self.lora_b_stacked), rows.for_kernel)

    return apply_packed


def multiplied(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] = ((), ()),
    rows: Sequence[torch.Tensor | int] = _NO_ROWS,
) -> torch.Tensor:
    """Return x Wᵀ + bias [..., H_out], plus what the adapters of `rows` add."""
    y: torch.Tensor = linear()(x.reshape(-1, x.shape[-1]), packed, bias, *adapters, *rows)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)


@cache
def linear() -> Any:
    """Return the operator of the compiled kernels; None where vLLM's may be faster, or without a compiler."""
    if not torch.cpu._is_avx2_supported() or torch.cpu._is_amx_tile_supported():
        return None
    compiled = kernels(Settings().cache_dir)
    return compiled.linear.default if compiled else None


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return weights [H_out, H_in] as [H_out / LANES, H_in / 2, LANES, 2]."""
    h_out, h_in = weight.shape
    return weight.reshape(h_out // LANES, LANES, h_in // 2, 2).permute(0, 2, 1, 3).contiguous()
