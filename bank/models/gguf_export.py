"""The packaged GGUF base model as a Hugging Face folder in bf16, made in a process of its own: only this needs torch.

python -m bank.models.gguf_export MODEL.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path


def export_gguf(source: Path, target: Path) -> None:
    """Dequantise a GGUF file into a folder: config, bf16 safetensors, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),  # otherwise the weights stay packed
        dtype=torch.float32,
    )
    # `save_pretrained` would otherwise write the plain weights under a config that calls them GGUF.
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    export_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
