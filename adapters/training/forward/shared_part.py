"""The tokens before the personal part acts: nothing that is trained moves them, so they are read once.

Their keys and values are what the other tokens attend to, in every step, fold and judgement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adapters.lora import LoraWeights
from adapters.training.attached import AdaptedLinear, attached
from adapters.training.example import Acts, Example

MAX_KEPT_BYTES = 1 << 28  # of keys and values that a bank's trainer keeps

Prefix = tuple[int, ...]  # token ids of a conversation before the personal part acts
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer, [1, K, T, D]


class SharedPart:
    """What reads the tokens before the personal part acts, the bank's common row, and what one model has read so."""

    def __init__(self, acts: Acts, lora: LoraWeights) -> None:
        self.lora = lora
        self._acts = acts
        self._kept: dict[Prefix, KeysValues] = {}
        self._kept_bytes = 0

    def prefix(self, example: Example) -> Prefix:
        return example.ids[: example.personal_from(self._acts)]

    def cache(self, model: Any, prefixes: Sequence[Prefix]) -> Any:
        """Return a Hugging Face cache with the keys and values of these prefixes, one after the other."""
        from transformers import DynamicCache

        read = [self._kept.get(prefix) for prefix in prefixes]
        if None in read:
            with attached(model, self.lora):
                read = [known or self._read(model, prefix) for known, prefix in zip(read, prefixes, strict=True)]
        layers = zip(*filter(None, read), strict=True)
        return DynamicCache([tuple(torch.cat(parts, 2) for parts in zip(*layer, strict=True)) for layer in layers])

    @torch.no_grad()
    def _read(self, model: Any, prefix: Prefix) -> KeysValues:
        from transformers import DynamicCache

        ids = torch.tensor([prefix]).to(model.device)
        cache = model.base_model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        read = [(keys, values) for keys, values, *_ in cache]
        size = sum(part.nbytes for layer in read for part in layer)
        if self._kept_bytes + size <= MAX_KEPT_BYTES:
            self._kept[prefix] = read
            self._kept_bytes += size
        return read


def shared_part_of(model: Any) -> SharedPart | None:
    """Return what reads the shared tokens for the adapter that is attached to the model, if anything does."""
    shared: SharedPart | None = next((one.shared for one in model.modules() if isinstance(one, AdaptedLinear)), None)
    return shared
