"""Tiny random models of the architectures that people use, as real files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.rig.tiny import CHAT_TEMPLATE, random_model

WITHOUT_SYSTEM = (  # as Gemma 2's and the first Mistral's
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
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
    options: Mapping[str, object] = field(default_factory=dict)  # of its configuration, beyond `bench.rig.tiny.SHAPE`
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
    return random_model(
        folder,
        kind.model_type,
        dict(kind.options) | changes,
        template=kind.template,
        around={"vision_config": VISION, "mm_tokens_per_image": 4} if kind.has_vision else None,
        seed=seed,
    )
