"""Quantise a tiny model as published checkpoints are, so that vLLM and training read the same formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP, BLOCK = 32, 128  # input columns that share a scale, and rows and columns of a block that do
PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # column at each place of an int32 in AWQ
FP8_MAX, INT8_MAX = 448.0, 127.0
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint says that it is quantised, and what becomes of a weight [H_out, H_in]."""

    config: Mapping[str, Any]
    parts: Callable[[torch.Tensor], Parts]


def quantised(plain: Path, name: str) -> Path:
    """Write a model with its linear modules quantised by one of `QUANTISATIONS`, beside it; return the folder."""
    kind, folder, weights = QUANTISATIONS[name], plain.with_name(f"{plain.name}-{name}"), dict[str, torch.Tensor]()
    shutil.copytree(plain, folder)
    for key, weight in load_file(plain / "model.safetensors").items():
        module = key.removesuffix(".weight")
        parts = kind.parts(weight.float()) if module.endswith("_proj") else {"weight": weight}
        weights |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": kind.config}), "utf-8")
    return folder


def _awq(weight: torch.Tensor) -> Parts:
    groups = _split(weight.T, 0, GROUP)  # [H_in/g, g, H_out]
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = (groups / scales + zeros).round().clamp(0, 15).flatten(0, 1)
    packed = [_packed(_split(each, 1, 8)[:, :, list(PLACES)].flatten(1), 1) for each in (numbers, zeros[:, 0])]
    return {"qweight": packed[0], "qzeros": packed[1], "scales": scales[:, 0].half()}


def _gptq(weight: torch.Tensor) -> Parts:
    numbers, scales = _symmetric(weight)
    zeros = torch.full(scales.T.shape, 7)  # one less than the zero, as GPTQ stores it
    g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    return {
        "qweight": _packed(numbers.T, 0),
        "qzeros": _packed(zeros, 1),
        "scales": scales.T.half(),
        "g_idx": g_idx,
    }


def _packed_int4(weight: torch.Tensor) -> Parts:
    numbers, scales = _symmetric(weight)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {"weight_packed": _packed(numbers, 1), "weight_scale": scales.bfloat16(), "weight_shape": shape}


def _fp8_blocks(weight: torch.Tensor) -> Parts:
    blocks = _split(_split(weight, 1, BLOCK), 0, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / FP8_MAX
    numbers = (blocks / scales).flatten(2, 3).flatten(0, 1)
    return {"weight": numbers.to(torch.float8_e4m3fn), "weight_scale_inv": scales[:, 0, :, 0]}


def _fp8_rows(weight: torch.Tensor) -> Parts:
    scales = (weight.abs().amax(1, keepdim=True) / FP8_MAX).bfloat16()
    return {"weight": (weight / scales.float()).to(torch.float8_e4m3fn), "weight_scale": scales}


def _int8_rows(weight: torch.Tensor) -> Parts:
    scales = (weight.abs().amax(1, keepdim=True) / INT8_MAX).bfloat16()
    return {"weight": (weight / scales.float()).round().clamp(-128, INT8_MAX).to(torch.int8), "weight_scale": scales}


def _symmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 4-bit numbers [H_out, H_in] around 8, and scales [H_out, H_in/g]."""
    groups = _split(weight, 1, GROUP)
    scales = (groups.abs().amax(2, keepdim=True) / 7).bfloat16().float()
    return ((groups / scales).round().clamp(-8, 7) + 8).flatten(1), scales[:, :, 0]


def _packed(numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """Pack 4-bit numbers into int32, eight along `dim`."""
    each = _split(numbers.long(), dim, 8)
    packed: torch.Tensor = each << torch.arange(0, 32, 4).view(-1, *[1] * (1 - dim))
    return packed.sum(dim + 1).to(torch.int32)


def _split(numbers: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Split `dim` of a tensor into two, the second of this size."""
    shape = numbers.shape
    return numbers.reshape(*shape[:dim], -1, size, *shape[dim + 1 :])


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True, "dynamic": False}
_FP8, _INT8 = ({"num_bits": 8, "type": kind, "symmetric": True} for kind in ("float", "int"))
_ROWS, _TOKENS = {"strategy": "channel", "dynamic": False}, {"strategy": "token", "dynamic": True}


def _compressed(format_: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> Mapping[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    ignored = {"ignore": ["lm_head"], "quantization_status": "compressed"}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}, **ignored}


QUANTISATIONS = {
    "awq": Quantisation(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, _awq
    ),
    "gptq": Quantisation(
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}, _gptq
    ),
    "fp8": Quantisation(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}, _fp8_blocks
    ),
    "int4-packed": Quantisation(_compressed("pack-quantized", _INT4, None), _packed_int4),
    "fp8-rows": Quantisation(_compressed("float-quantized", _FP8 | _ROWS, _FP8 | _TOKENS), _fp8_rows),
    "int8-rows": Quantisation(_compressed("int-quantized", _INT8 | _ROWS, _INT8 | _TOKENS), _int8_rows),
}
