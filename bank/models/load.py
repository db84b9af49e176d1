"""Load a frozen base model, for training rows and user adapters and for scoring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from adapters.training.forward.attention import use_quick_attention
from bank.errors import BankError
from bank.models.process_startup import BF16_FLAGS, cpu_flags, without_audio


def load_base(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Load the base model in `bfloat16` or `float32`, frozen, on the GPU if there is one; and its tokenizer."""
    without_audio()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = "sdpa" if device == "cuda" else "eager"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        weights = getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights, attn_implementation=attention).to(device)
    except (OSError, ValueError) as error:
        raise BankError(f"cannot load the base model at {folder}: {error}") from error
    if not tokenizer.chat_template:
        raise BankError(
            f"the base model at {folder} has no chat template, so user turns cannot be rendered: use a chat model, or "
            "add a chat_template to its tokenizer"
        )
    if device == "cpu":
        use_quick_attention(model)
    return model.requires_grad_(False), tokenizer


def limit_gpu(share: float | None) -> None:
    """Limit this process to a share of the GPU's memory, CUDA's own memory not counted; None for no limit."""
    if share and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def resolve_dtype(dtype: str) -> str:
    """Resolve `auto` to bfloat16 if the hardware multiplies it fast, else float32; return other values unchanged."""
    if dtype != "auto":
        return dtype
    fast = torch.cuda.is_available() or bool(BF16_FLAGS & cpu_flags())
    return "bfloat16" if fast else "float32"


def export_gguf(source: Path, target: Path) -> None:
    """Dequantise a GGUF file into a folder: config, bf16 safetensors, tokenizer with its chat template.

    `python -m bank.models.load MODEL.gguf FOLDER` runs this in a separate process, so that the caller needs no torch.
    """
    without_audio()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),  # otherwise the weights stay quantised
        dtype=torch.float32,
    )
    # Otherwise `save_pretrained` would write the dequantised weights with a config that declares them as GGUF.
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    export_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
