"""Dequantise a base model's weights for training and scoring; vLLM serves the quantised files themselves.

The formats, with weight [H_out, H_in], groups of g input columns, and 4-bit numbers packed eight to an int32:

    awq                 qweight [H_in, H_out/8] interleaved, qzeros [H_in/g, H_out/8], scales [H_in/g, H_out]
    gptq                qweight [H_in/8, H_out], scales [H_in/g, H_out], g_idx [H_in]
    fp8                 weight, weight_scale_inv of blocks, or weight_scale of the tensor or of its rows
    compressed-tensors  as fp8, also with int8; or weight_packed [H_out, H_in/8], weight_scale [H_out, H_in/g]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bank.errors import BankError

METHODS = ("awq", "gptq", "fp8", "compressed-tensors")
BITS, PACKED = 4, 8  # bits of a packed number, and numbers in an int32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place of each of eight columns in its int32
MIDDLE = 8  # zero of 4-bit numbers without zeros of their own
PARTS = {
    *("qweight", "qzeros", "scales", "g_idx", "weight", "weight_scale_inv", "weight_scale", "input_scale"),
    *("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
}
"""Last parts of the names of tensors that belong to a module's weight."""


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a model is quantised, None if it is not; raise BankError if training cannot undo it."""
    quantisation: dict[str, Any] | None = config.get("quantization_config") or None
    if quantisation is None:
        return None
    method, bits = quantisation.get("quant_method"), quantisation.get("bits", quantisation.get("w_bit", BITS))
    one_sided = method == "gptq" and not quantisation.get("sym", True)
    if method not in METHODS or bits != BITS or one_sided:
        how = f"{bits} bits" + (", not symmetric" if one_sided else "")
        raise BankError(
            f"the base model is quantised by {method} with {how}, which training cannot undo: use the model "
            f"without quantisation, or quantised by {', '.join(METHODS)} (awq and symmetric gptq with {BITS} bits)"
        )
    return quantisation


def plain_weights(folder: Path, quantisation: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return all weights of a quantised model by name; raise BankError if a file or a format cannot be read."""
    weights, parts = dict[str, torch.Tensor](), dict[str, dict[str, torch.Tensor]]()
    try:
        for path in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                module, _, ending = name.rpartition(".")
                if ending in PARTS:
                    parts.setdefault(module, {})[ending] = tensor
                else:
                    weights[name] = tensor
    except (OSError, SafetensorError) as error:
        raise BankError(f"cannot read the weights of the base model at {folder}: {error}") from error
    for module, part in parts.items():
        weights[f"{module}.weight"] = _weight(module, part, quantisation).to(dtype)
    return weights


def _weight(module: str, part: Mapping[str, torch.Tensor], quantisation: Mapping[str, Any]) -> torch.Tensor:
    """Return one module's weight [H_out, H_in], in float32 if it was quantised."""
    if "qweight" in part:
        return _grouped(part, quantisation["quant_method"]).T.contiguous()
    if "weight_packed" in part:
        return _symmetric(module, part)
    weight, scales = part["weight"], part.get("weight_scale_inv", part.get("weight_scale"))
    if scales is None:
        return weight
    scales = scales.float().view(*scales.shape, *[1] * (2 - scales.dim()))
    block = quantisation.get("weight_block_size") or [
        -(-size // n) for size, n in zip(weight.shape, scales.shape, strict=True)
    ]
    for dim, size in enumerate(weight.shape):
        scales = scales.repeat_interleave(block[dim], dim).narrow(dim, 0, size)
    return weight.float() * scales


def _grouped(part: Mapping[str, torch.Tensor], method: str) -> torch.Tensor:
    """Return a weight [H_in, H_out] of AWQ or GPTQ."""
    scales = part["scales"].float()
    if method == "awq":
        numbers, zeros = (_in_order(_unpacked(part[name], 1)) for name in ("qweight", "qzeros"))
    else:  # vLLM takes symmetric GPTQ alone, and ignores `qzeros`, which some formats store less one
        numbers, zeros = _unpacked(part["qweight"], 0), torch.full_like(scales, MIDDLE)
    groups = part.get("g_idx", torch.arange(len(numbers)) * len(scales) // len(numbers)).long()
    return (numbers - zeros[groups]) * scales[groups]


def _symmetric(module: str, part: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a weight [H_out, H_in] of `weight_packed`."""
    numbers, scales, width = _unpacked(part["weight_packed"], 1), part["weight_scale"].float(), part["weight_shape"][1]
    if numbers.shape[1] != width or part.keys() & {"weight_zero_point", "weight_g_idx"}:
        raise BankError(
            f"{module} of the base model is packed with other than {BITS} bits, with zero points or in another order, "
            "which training cannot undo: use the model without quantisation"
        )
    return (numbers - MIDDLE) * scales.repeat_interleave(numbers.shape[1] // scales.shape[1], 1)


def _unpacked(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the 4-bit numbers of an int32 matrix, eight times as many along `dim`."""
    shifts = torch.arange(0, BITS * PACKED, BITS, dtype=torch.int32)
    numbers: torch.Tensor = (packed.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (1 - dim))) & (2**BITS - 1)
    return numbers.flatten(dim, dim + 1)


def _in_order(numbers: torch.Tensor) -> torch.Tensor:
    """Undo AWQ's interleaving of eight columns."""
    return numbers.view(len(numbers), -1, PACKED)[:, :, list(AWQ_ORDER)].flatten(1)
