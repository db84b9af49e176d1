"""Speed limits: the memory bandwidth and arithmetic of GPU or CPU, and the amount of both that a model needs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bank.manifest import BankManifest

BF16_BYTES = 2
_WHILE_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory bytes per second, and bf16 operations per second in products of a prompt's size."""

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measured(cls, model: Model, tokens: int = 400) -> Limits:
        """Measure the GPU, or all cores; takes a few seconds."""
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        numbers = torch.ones(256 << 20, dtype=torch.uint8, device=device).view(torch.int64)  # far beyond any cache
        read_s = _fastest(numbers.sum)
        rows = torch.randn(tokens, model.hidden, dtype=torch.bfloat16, device=device)
        weights = torch.randn(8, model.inner, model.hidden, dtype=torch.bfloat16, device=device)
        product_s = _fastest(lambda: [torch.nn.functional.linear(rows, weight) for weight in weights][-1])
        flops = 2 * tokens * model.hidden * model.inner * len(weights)
        return cls(numbers.numel() * numbers.itemsize / read_s, flops / product_s)


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a decoder, from its configuration.

    Attributes:
        weights: number of weights in all linear layers, including the head.
        hidden, inner: sizes of the residual stream and of the feed-forward layer.
        heads_size: total size of the attention heads.
        cached: numbers in the KV cache per token.
        layers: number of layers.
    """

    weights: int
    hidden: int
    inner: int
    heads_size: int
    cached: int
    layers: int

    @classmethod
    def read(cls, folder: Path) -> Model:
        """Read the sizes from a model's folder."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        keys = (config.get("num_key_value_heads") or heads) * size
        layer = hidden * (2 * heads * size + 2 * keys + 3 * inner)
        weights = layers * layer + hidden * config["vocab_size"]
        return cls(weights, hidden, inner, heads * size, 2 * layers * keys, layers)

    def step_bytes(self, contexts: int, adapters: int = 0, manifest: BankManifest | None = None) -> int:
        """Return the bytes that a decode step reads for `contexts` tokens and `adapters`; a shared A is read once."""
        numbers = self.weights + contexts * self.cached
        if adapters and manifest is not None:
            rank = manifest.fused_rank
            a = rank * sum(module.h_in for module in manifest.modules)
            b = rank * sum(module.h_out for module in manifest.modules)
            numbers += adapters * b + (1 if manifest.layout.shared_a else adapters) * a
        return numbers * BF16_BYTES

    def prompt_flops(self, tokens: int, manifest: BankManifest | None = None) -> int:
        """Return the operations for a prompt; the head computes only its last token."""
        head = self.weights - self._body
        attention = 2 * self.layers * self.heads_size * tokens * tokens  # the causal half of Q Kᵀ and of P V
        adapter = 0
        if manifest is not None:
            adapter = manifest.fused_rank * sum(module.h_in + module.h_out for module in manifest.modules)
        return 2 * (self._body + adapter) * tokens + attention + 2 * head

    @property
    def _body(self) -> int:
        """Number of weights in all linear layers but the head."""
        keys = self.cached // (2 * self.layers)
        return self.layers * self.hidden * (2 * self.heads_size + 2 * keys + 3 * self.inner)


def _fastest(work: Any) -> float:
    """Return the seconds of the fastest of several runs, which is the least disturbed one."""
    times: list[float] = []
    while sum(times) < _WHILE_S or len(times) < 3:
        start_s = time.perf_counter()
        work().flatten()[0].item()  # waits for the device
        times.append(time.perf_counter() - start_s)
    return min(times)
