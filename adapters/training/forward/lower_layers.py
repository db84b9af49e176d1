"""Cache the hidden states of each example below the first trained layer, so that every step need not recompute them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.training.example import Example
from adapters.training.forward.packing import Row, pack

MAX_IDS = 32_768  # maximum number of tokens with cached states, which take 38 MB for a 135M model

_PLAIN = {
    *("self", "hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"),
    *("position_embeddings", "kwargs"),
}
_PLACE = re.compile(r"(.+?)\.(\d+)\.")


def upper_half(model: Any, names: Iterable[str]) -> tuple[str, int] | None:
    """Return the layer list's name and the first layer of the upper half; None if that half cannot run alone.

    All modules must be in one list, whose layers map hidden states to hidden states and use no other earlier output.
    """
    matches = [_PLACE.match(name) for name in names]
    lists = {match[1] if match else "" for match in matches}
    adapted = sorted({int(match[2]) for match in matches if match})
    if len(lists) != 1 or "" in lists or len(adapted) < 2:
        return None
    (name,) = lists
    for layer in model.get_submodule(name):
        signature = inspect.signature(type(layer).forward)
        if signature.return_annotation not in {torch.Tensor, "torch.Tensor"} or set(signature.parameters) - _PLAIN:
            return None
    return name, adapted[len(adapted) // 2]


def layer_of(name: str) -> int:
    match = _PLACE.match(name)
    assert match
    return int(match[2])


class LowerLayers:
    """The layers of a model below `first`, the first trained layer."""

    def __init__(self, model: Any, layers: torch.nn.ModuleList, first: int) -> None:
        self._model = model
        self._layers = layers
        self._first = first
        self._cache: dict[Example, torch.Tensor] = {}

    @contextmanager
    def skipped(self, row: Row) -> Iterator[None]:
        """Skip the lower layers while the context is active; the model must then be called with this row."""
        states = self._states(row)
        with self._replaced(lambda layer: _identity if layer else lambda *_, **__: states, range(self._first)):
            yield

    def _states(self, row: Row) -> torch.Tensor:
        """Return the hidden states of a row above the lower layers, [1, T, H]."""
        states = {example: self._cache[example] for example in row.examples if example in self._cache}
        for missing in pack(self._model, [example for example in row.examples if example not in states]):
            states |= self._compute(missing)
        for example in row.examples:
            if sum(map(len, self._cache.values())) + len(states[example]) <= MAX_IDS:
                self._cache[example] = states[example]
        own = [states[example][row.shared :] for example in row.examples]
        return torch.cat([states[row.examples[0]][: row.shared], *own])[None]

    @torch.no_grad()
    def _compute(self, row: Row) -> dict[Example, torch.Tensor]:
        """Run the lower layers, and return the hidden states of each example of a row, [T, H]."""
        caught, inputs = list[torch.Tensor](), row.inputs(self._model, logits=False)

        def catch(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            caught.append(hidden_states)
            return hidden_states

        above = range(self._first, len(self._layers))
        with self._replaced(lambda layer: catch if layer == self._first else _identity, above), row.being_read():
            self._model.base_model(**inputs, use_cache=False)
        lengths = [row.owners.count(owner) for owner in range(-1, len(row.examples))]
        shared, *own = torch.split(caught[0][0], lengths)
        return {example: torch.cat([shared, part]) for example, part in zip(row.examples, own, strict=True)}

    @contextmanager
    def _replaced(self, forward: Callable[[int], Callable[..., torch.Tensor]], layers: range) -> Iterator[None]:
        for layer in layers:
            self._layers[layer].forward = forward(layer)
        try:
            yield
        finally:
            for layer in layers:
                del self._layers[layer].forward


def _identity(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states
