"""Attaching LoRAs to a base model for training, and detaching them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.lora import LoraWeights
from adapters.training.forward.adapted_linear import AdaptedLinear


class Attached:
    """A base model that carries a LoRA to train, and maybe a frozen one beside it.

    Attributes:
        model: the base model; its adapted modules are replaced as long as this lasts.
        layers: what replaces those with the LoRA to train, by name.
    """

    def __init__(self, model: Any, layers: dict[str, AdaptedLinear], frozen: dict[str, AdaptedLinear]) -> None:
        self.model = model
        self.layers = layers
        self._all = [*layers.values(), *frozen.values()]

    def put(self, lora: LoraWeights) -> None:
        """Set the weights of the LoRA to train."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.a.copy_(lora.a[name])
                layer.b.copy_(lora.b[name])

    def trainable(self, *, train_a: bool) -> list[torch.nn.Parameter]:
        """Freeze all but the trained LoRA's B (and its A with `train_a`), and return the parameters that move."""
        moving = [layer.b for layer in self.layers.values()]
        return self._only(moving + [layer.a for layer in self.layers.values()] if train_a else moving)

    def insert_cores(self) -> list[torch.nn.Parameter]:
        """Put 1 + C, with C zero, between A and B of the trained LoRA, freeze all else, and return what moves."""
        return self._only([layer.insert_core() for layer in self.layers.values()])

    def _only(self, chosen: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Freeze everything but these."""
        self.model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        self.model.eval()  # dropout of the base would make the loss noisy and the result depend on global state
        return chosen

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """The base model alone, until the block ends."""
        for layer in self._all:
            layer.silent = True
        try:
            yield
        finally:
            for layer in self._all:
                layer.silent = False

    def cores(self) -> dict[str, torch.Tensor]:
        """C [R, R] of every module as it is now, float32 on CPU."""
        found = {}
        for name, layer in self.layers.items():
            assert layer.core is not None
            found[name] = layer.core.detach().cpu() - torch.eye(len(layer.core))
        return found

    def b_gradients(self) -> dict[str, torch.Tensor]:
        """The gradient with respect to the trained LoRA's B, after a backward pass, on CPU."""
        return {name: layer.b.grad.cpu() for name, layer in self.layers.items() if layer.b.grad is not None}

    def weights(self) -> LoraWeights:
        """The trained LoRA as it is now, float32 on CPU."""
        a = {name: layer.a.detach().cpu().clone() for name, layer in self.layers.items()}
        b = {name: layer.b.detach().cpu().clone() for name, layer in self.layers.items()}
        return LoraWeights(len(next(iter(a.values()))), a, b)


@contextmanager
def attached(model: Any, trained: LoraWeights, frozen: LoraWeights | None = None) -> Iterator[Attached]:
    """Attach a LoRA to train and, if given, a frozen one beside it; afterwards the model is as it was.

    Args:
        model: a Hugging Face causal language model.
        trained: where training starts, and which modules it adapts.
        frozen: a LoRA that is active but does not move, or None; of these modules and maybe others.
    """
    layers = {}
    for name in {**(frozen.a if frozen else {}), **trained.a}:
        beside = (frozen.a[name], frozen.b[name]) if frozen else None
        layers[name] = AdaptedLinear(model.get_submodule(name), trained.rank if name in trained.a else 0, beside)
    still = {name: layer for name, layer in layers.items() if name not in trained.a}
    here = Attached(model, {name: layers[name] for name in trained.a}, still)
    here.put(trained)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer, strict=True)
        yield here
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer.base, strict=True)
