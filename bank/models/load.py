"""Load a frozen base model, for training rows and user adapters and for scoring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from adapters.errors import excerpt
from adapters.training.forward.attention import use_quick_attention
from bank.errors import BankError
from bank.models.folders import model_config
from bank.models.process_startup import BF16_FLAGS, cpu_flags, without_audio
from bank.models.quantised import plain_weights, quantisation_of


def load_base(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Load the base model in `bfloat16` or `float32`, frozen, on the GPU if there is one; and its tokenizer."""
    without_audio()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        loaded: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention_of(config, device)}
        loaded["output_loading_info"] = True
        if quantisation := quantisation_of(model_config(folder)):
            del config.quantization_config
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config))
            weights = plain_weights(folder, quantisation, loaded["dtype"])
            model, told = kind.from_pretrained(None, config=config, state_dict=weights, **loaded)
        else:
            model, told = AutoModelForCausalLM.from_pretrained(folder, **loaded)
        if missing := sorted(told["missing_keys"]):  # which would have random weights
            raise ValueError(f"it lacks {len(missing)} tensors, the first of them {missing[0]}")
        model = model.to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BankError(f"cannot load the base model at {folder}: {error}") from error
    if device == "cpu":
        use_quick_attention(model)
    return model.requires_grad_(False), tokenizer


def attention_of(config: Any, device: str) -> str:
    """Return the name of Hugging Face's attention to train with: its fast one on GPUs ignores Gemma 2's soft cap."""
    soft_cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if device == "cuda" and not soft_cap else "eager"


def limit_gpu(fraction: float | None) -> None:
    """Limit this process to a share of the GPU's memory, CUDA's own memory not counted; None for no limit."""
    if fraction and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(fraction)


def resolve_dtype(dtype: str) -> str:
    """Resolve `auto` to bfloat16 if the hardware multiplies it fast, else float32; BankError if it is neither."""
    if dtype in ("bfloat16", "float32"):
        return dtype
    if dtype != "auto":
        raise BankError(f"--dtype: must be auto, bfloat16 or float32, got {excerpt(dtype)}")
    fast = torch.cuda.is_available() or bool(BF16_FLAGS & cpu_flags())
    return "bfloat16" if fast else "float32"


def export_gguf(source: Path, target: Path) -> None:
    """Dequantise a GGUF file, as `python -m bank.models.load MODEL.gguf FOLDER`, so that the caller needs no torch."""
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
