"""What training computes from a quantised checkpoint is the weight that was quantised, to half a step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bank.errors import BankError
from bank.models.load import load_base
from bank.models.quantised import plain_weights, quantisation_of
from bank.peft.imported import linear_shapes
from tests.support.architectures import tiny_of
from tests.support.quantised import BLOCK, FP8_MAX, GROUP, INT8_MAX, QUANTISATIONS, quantised


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths are no multiples of a block, as k and v of small models, but for q."""
    wide = {"hidden_size": BLOCK, "intermediate_size": 2 * BLOCK, "num_key_value_heads": 4}
    return tiny_of("llama", tmp_path_factory.mktemp("quantised") / "model", **wide)


def half_a_step(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The largest error of a quantised weight [H_out, H_in], but for the rounding of scales."""
    if name.startswith("fp8"):
        return weight.abs() / 16 + weight.abs().max() / FP8_MAX / 512
    if name.startswith("int8"):
        return weight.abs().amax(1, keepdim=True) / INT8_MAX * 0.55
    groups = weight.view(len(weight), -1, GROUP)
    step = (groups.amax(2) - groups.amin(2)) / 15 if name == "awq" else groups.abs().amax(2) / 7
    return step.repeat_interleave(GROUP, 1) * (1.05 if name == "awq" else 0.55)  # AWQ's zero is rounded, too


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_quantised_weights_are_computed_back_and_loaded(plain: Path, name: str) -> None:
    folder, before = quantised(plain, name), load_file(plain / "model.safetensors")
    model, _ = load_base(folder, "float32")
    found = {key: tensor for key, tensor in model.state_dict().items() if key in before}
    assert found.keys() == before.keys()
    for key, weight in before.items():
        if key.endswith("_proj.weight"):
            assert ((found[key] - weight.float()).abs() <= half_a_step(weight.float(), name) + 1e-6).all(), key
            assert not torch.equal(found[key], weight.float())
        else:
            assert torch.equal(found[key], weight.float())


def test_blocks_at_the_edge_of_a_weight_are_narrower(tmp_path: Path) -> None:
    weight = torch.ones(BLOCK + 8, 16).to(torch.float8_e4m3fn)
    save_file({"m.weight": weight, "m.weight_scale_inv": torch.tensor([[2.0], [3.0]])}, tmp_path / "model.safetensors")
    [found] = plain_weights(tmp_path, QUANTISATIONS["fp8"].config, torch.float32).values()
    assert found[:BLOCK].eq(2).all() and found[BLOCK:].eq(3).all()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "gptq", "bits": 8}, "gptq with 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "sym": False}, "gptq with 4 bits, not symmetric"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
    ids=["bits", "zeros", "method"],
)
def test_what_cannot_be_undone_is_refused_with_what_can(config: dict[str, Any], reason: str) -> None:
    assert quantisation_of({}) is None
    with pytest.raises(BankError, match=f"{reason}.*use the model without quantisation, or quantised by awq, gptq"):
        quantisation_of({"quantization_config": config})


def test_a_model_with_damaged_weights_is_refused(tmp_path: Path, plain: Path) -> None:
    weights = shutil.copytree(plain, tmp_path / "model") / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(weights).items() if "q_proj" not in name}, weights, {"format": "pt"}
    )
    with pytest.raises(BankError, match=r"it lacks \d+ tensors, the first of them .*q_proj"):
        load_base(weights.parent, "float32")
    weights.write_bytes(weights.read_bytes()[:9999])
    with pytest.raises(BankError, match="cannot load the base model at"):
        load_base(weights.parent, "float32")
    with pytest.raises(BankError, match="cannot read the base model at"):
        linear_shapes(weights.parent)


def test_other_packed_widths_and_broken_files_are_refused(tmp_path: Path, plain: Path) -> None:
    config, file = QUANTISATIONS["int4-packed"].config, tmp_path / "model.safetensors"
    parts = QUANTISATIONS["int4-packed"].parts(torch.randn(32, 64))
    save_file(
        {f"m.{name}": tensor for name, tensor in (parts | {"weight_shape": torch.tensor([32, 32])}).items()}, file
    )
    with pytest.raises(BankError, match="m of the base model is packed with other than 4 bits"):
        plain_weights(tmp_path, config, torch.float32)
    file.write_bytes(b"nonsense")
    with pytest.raises(BankError, match=f"cannot read the weights of the base model at {tmp_path}"):
        plain_weights(tmp_path, config, torch.float32)
