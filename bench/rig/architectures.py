"""Tiny random models of the architectures that people use, as real files: two layers, hidden 64, a byte tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (  # strict, as many models' are
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "{% if not loop.first and message['role'] == loop.previtem['role'] %}"
    "{{ raise_exception('after ' + message['role'] + ' comes another role') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
WITHOUT_SYSTEM = (  # as Gemma 2's and the first Mistral's
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "initializer_range": 0.1,  # large enough for adapters to change the greedy token
}

VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture as Hugging Face names it, with what sets it apart from a Llama."""

    model_type: str
    options: Mapping[str, object] = field(default_factory=dict)  # of its configuration, beyond `SHAPE`
    template: str = CHAT_TEMPLATE
    has_vision: bool = False  # the options are those of the language model in it


ARCHITECTURES = {
    "llama": Architecture("llama", {"tie_word_embeddings": False}),
    "qwen2": Architecture("qwen2", {"tie_word_embeddings": True, "num_attention_heads": 2}),  # biases on q, k and v
    "qwen3": Architecture("qwen3", {"tie_word_embeddings": True}),  # norms of q and k
    "mistral": Architecture("mistral", {"sliding_window": 256}, WITHOUT_SYSTEM),
    "gemma2": Architecture(
        "gemma2",
        {"sliding_window": 256, "query_pre_attn_scalar": 32, "final_logit_softcapping": 30.0},
        WITHOUT_SYSTEM,
    ),
    "gemma3": Architecture(
        "gemma3_text", {"sliding_window": 256, "query_pre_attn_scalar": 32, "sliding_window_pattern": 2}
    ),
    "gemma3_vision": Architecture("gemma3", {"sliding_window": 256, "query_pre_attn_scalar": 32}, has_vision=True),
    "phi3": Architecture("phi3"),  # one matrix for q, k and v, one for gate and up
    "granite": Architecture(
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": Architecture("olmo2"),  # norms after attention, and of q and k
    "smollm3": Architecture("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
}


def tiny_of(architecture: str, folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write a random model of one of `ARCHITECTURES` with a byte-level tokenizer and a chat template."""
    kind = ARCHITECTURES[architecture]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = kind.template
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|pad|>"))
    special = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": pad}
    options = SHAPE | special | dict(kind.options) | changes
    if kind.has_vision:
        options = {"text_config": options, "vision_config": VISION, "mm_tokens_per_image": 4}
    config = CONFIG_MAPPING[kind.model_type](**options)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer(size: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and the chat marks, filled up to `size` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [f"filler{i}" for i in range(size - len(alphabet) - len(SPECIAL))]
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast
