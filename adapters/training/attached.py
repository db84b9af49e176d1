"""Attach LoRAs to a base model for training, and detach them; they compute in the base model's dtype, as in serving.

The trained parameters are float32, so that small steps are not lost. Both passes are explicit: automatic
differentiation takes 50 % longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from adapters.lora import LoraWeights


@dataclass(frozen=True)
class Attached:
    """A base model with a trainable LoRA and optionally a frozen one; its adapted modules are replaced for now."""

    model: Any
    _trained: dict[str, AdaptedLinear]

    def put(self, lora: LoraWeights) -> None:
        with torch.no_grad():
            for name, layer in self._trained.items():
                layer.a.copy_(lora.a[name])
                layer.b.copy_(lora.b[name])

    def trainable(self, *, train_a: bool) -> list[torch.nn.Parameter]:
        """Freeze all but the trained LoRA's B (with `train_a` also its A), and return the trainable parameters."""
        parameters = [layer.b for layer in self._trained.values()]
        if train_a:
            parameters += [layer.a for layer in self._trained.values()]
        self.model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.model.eval()  # dropout would make the loss noisy and the result depend on global state
        return parameters

    def take_b_gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradient of the trained LoRA's B after a backward pass, and clear it."""
        gradients = {name: layer.b.grad for name, layer in self._trained.items() if layer.b.grad is not None}
        for layer in self._trained.values():
            layer.b.grad = None
        return gradients

    def weights(self) -> LoraWeights:
        """Return the trained LoRA, float32 on CPU."""
        a = {name: layer.a.detach().cpu().clone() for name, layer in self._trained.items()}
        b = {name: layer.b.detach().cpu().clone() for name, layer in self._trained.items()}
        return LoraWeights(len(next(iter(a.values()))), a, b)


@contextmanager
def attached(
    model: Any, trained: LoraWeights, frozen: LoraWeights | None = None, shared: Any = None
) -> Iterator[Attached]:
    """Attach a LoRA that starts at `trained`, and perhaps a frozen one, of the same modules or more; then detach.

    With a `shared` part (`forward/shared_part.py`) they read what comes after it. What was attached before is put
    aside meanwhile.
    """
    aside = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}
    bases = {name: layer.base for name, layer in aside.items()}
    layers = {}
    for name in (frozen or trained).a:
        base = bases.setdefault(name, model.get_submodule(name))
        beside = (frozen.a[name], frozen.b[name]) if frozen else None
        layers[name] = AdaptedLinear(base, trained.rank if name in trained.a else 0, beside, shared)
    here = Attached(model, {name: layers[name] for name in trained.a})
    here.put(trained)
    try:
        for name, layer in (bases | layers).items():
            model.set_submodule(name, layer, strict=True)
        yield here
    finally:
        for name, layer in (bases | aside).items():
            model.set_submodule(name, layer, strict=True)


@contextmanager
def half_without(model: Any) -> Iterator[None]:
    """Let what is attached read the first half of each batch without the trained LoRA; needs `torch.no_grad`."""
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedLinear)]
    for layer in layers:
        layer.half_without = True
    try:
        yield
    finally:
        for layer in layers:
            layer.half_without = False


class AdaptedLinear(torch.nn.Module):
    """A frozen linear module with a trainable float32 LoRA, `a` and `b`, and optionally a frozen one."""

    def __init__(
        self,
        base: torch.nn.Linear,
        rank: int,
        frozen: tuple[torch.Tensor, torch.Tensor] | None,
        shared: Any,
    ) -> None:
        super().__init__()
        weight = base.weight
        self.base = base
        self.shared = shared  # what reads the tokens before those that this module gets
        self.a = torch.nn.Parameter(weight.new_zeros(rank, base.in_features, dtype=torch.float32), requires_grad=False)
        self.b = torch.nn.Parameter(weight.new_zeros(base.out_features, rank, dtype=torch.float32), requires_grad=False)
        self._first = len(frozen[0]) if frozen else 0
        self._down = weight.new_zeros(self._first + rank, base.in_features)
        self._up = weight.new_zeros(base.out_features, self._first + rank)
        if frozen:
            self._down[: self._first] = frozen[0]
            self._up[:, : self._first] = frozen[1]
        self._copied: tuple[int, int] | None = None
        self.half_without = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        versions = (self.a._version, self.b._version)
        if versions != self._copied:
            with torch.no_grad():
                self._down[self._first :] = self.a
                self._up[:, self._first :] = self.b
            self._copied = versions
        if self.half_without:
            low = x @ self._down.T
            low[: len(x) // 2, ..., self._first :] = 0
            return torch.nn.functional.linear(x, self.base.weight, self.base.bias) + low @ self._up.T
        y: torch.Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
            x, self.a, self.b, self.base.weight, self.base.bias, self._down, self._up
        )
        return y


class _LowRank(torch.autograd.Function):
    """y = x Wᵀ + bias + (x Downᵀ) Upᵀ, where the last rows of Down are A and the last columns of Up are B."""

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        u = flat @ down.T
        y = torch.nn.functional.linear(flat, weight, bias).addmm_(u, up.T)
        ctx.save_for_backward(flat, u, weight, down, up)
        ctx.shape, ctx.rank = x.shape, len(a)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, u, weight, down, up = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        of_x = of_a = of_b = None
        if needs_x or needs_a:
            of_u = grad @ up
        if needs_x:
            of_x = (grad @ weight).addmm_(of_u, down).view(ctx.shape)
        if needs_a:
            of_a = (of_u[:, -ctx.rank :].T @ flat).float()
        if needs_b:
            of_b = (u[:, -ctx.rank :].T @ grad).T.float()
        return of_x, of_a, of_b, None, None, None, None
