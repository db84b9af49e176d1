"""The layers of a model below the first that moves: what they make of an example is computed once, not every step."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.training.example import Example
from adapters.training.forward.attention import in_blocks
from adapters.training.forward.packing import Row, pack

MAX_IDS = 32_768  # most ids whose states are kept; those of a 135M model take 38 MB

_PLAIN = {
    *("self", "hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"),
    *("position_embeddings", "kwargs"),
}
_PLACE = re.compile(r"(.+?)\.(\d+)\.")


def upper_half(model: Any, names: Iterable[str]) -> tuple[str, int] | None:
    """Name of the list of layers, and the first layer of the upper half of those with these adapted modules.

    None unless a model can run from there on its own: all modules are in the layers of one list, and each layer turns
    hidden states into hidden states and takes nothing else from the layers before it.
    """
    places = [_PLACE.match(name) for name in names]
    lists = {place[1] if place else "" for place in places}
    adapted = sorted({int(place[2]) for place in places if place})
    if len(lists) != 1 or "" in lists or len(adapted) < 2:
        return None
    (name,) = lists
    for layer in model.get_submodule(name):
        signature = inspect.signature(type(layer).forward)
        if signature.return_annotation not in {torch.Tensor, "torch.Tensor"} or set(signature.parameters) - _PLAIN:
            return None
    return name, adapted[len(adapted) // 2]


def layer_of(name: str) -> int:
    place = _PLACE.match(name)
    assert place
    return int(place[2])


class LowerLayers:
    """The layers of a model below the `first` that moves."""

    def __init__(self, model: Any, layers: torch.nn.ModuleList, first: int) -> None:
        self._model = model
        self._layers = layers
        self._first = first
        self._kept: dict[Example, torch.Tensor] = {}

    @contextmanager
    def skipped(self, row: Row) -> Iterator[None]:
        """Until this ends, the model reads this row, and its lower layers are not run."""
        states = self._states(row)
        with self._instead(lambda layer: _passed if layer else lambda *_, **__: states, range(self._first)):
            yield

    def _states(self, row: Row) -> torch.Tensor:
        """What the lower layers make of a row, [1, T, H]."""
        made = {example: self._kept[example] for example in row.examples if example in self._kept}
        for missing in pack(self._model, [example for example in row.examples if example not in made]):
            made |= self._made(missing)
        for example in row.examples:
            if sum(len(kept.ids) for kept in self._kept) + len(example.ids) <= MAX_IDS:
                self._kept[example] = made[example]
        own = [made[example][row.shared :] for example in row.examples]
        return torch.cat([made[row.examples[0]][: row.shared], *own])[None]

    @torch.no_grad()
    def _made(self, row: Row) -> dict[Example, torch.Tensor]:
        """What the lower layers make of each example of a row, [T, H]."""
        caught: list[torch.Tensor] = []

        def catch(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            caught.append(hidden_states)
            return hidden_states

        above = range(self._first, len(self._layers))
        with self._instead(lambda layer: catch if layer == self._first else _passed, above), in_blocks(row.blocks()):
            self._model.base_model(**row.inputs(self._model, logits=False), use_cache=False)
        lengths = [row.shared, *(len(example.ids) - row.shared for example in row.examples)]
        shared, *own = torch.split(caught[0][0], lengths)
        return {example: torch.cat([shared, part]) for example, part in zip(row.examples, own, strict=True)}

    @contextmanager
    def _instead(self, forward: Callable[[int], Callable[..., torch.Tensor]], layers: range) -> Iterator[None]:
        for layer in layers:
            self._layers[layer].forward = forward(layer)
        try:
            yield
        finally:
            for layer in layers:
                del self._layers[layer].forward


def _passed(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states
