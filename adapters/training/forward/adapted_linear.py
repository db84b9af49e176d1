"""A linear module with a LoRA, made for training: what does not move costs next to nothing.

The LoRA is computed in the base's own type, mostly bf16, as it will be served. What moves is kept in float32, so that
small steps are not lost, and copied whenever it has changed. Forward and backward are written out: automatic
differentiation would cast to float32 and back around each LoRA and keep more tensors, and with that take half as long
again as the base model.
"""

from __future__ import annotations

from typing import Any

import torch


class AdaptedLinear(torch.nn.Module):
    """A frozen linear module, a LoRA that moves and, if given, one that does not.

    Args:
        base: the module that it replaces.
        rank: R of the LoRA that moves.
        frozen: A [R_f, H_in] and B [H_out, R_f] of the other.

    Attributes:
        a, b: of the LoRA that moves, [R, H_in] and [H_out, R], float32.
        core: 1 + C [R, R] between them, where there is one.
        silent: whether the base module answers alone.
    """

    def __init__(
        self, base: torch.nn.Linear, rank: int, frozen: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        weight = base.weight
        self.base = base
        self.a = torch.nn.Parameter(weight.new_zeros(rank, base.in_features, dtype=torch.float32), requires_grad=False)
        self.b = torch.nn.Parameter(weight.new_zeros(base.out_features, rank, dtype=torch.float32), requires_grad=False)
        self.core: torch.nn.Parameter | None = None
        self.silent = False
        self._first = len(frozen[0]) if frozen else 0
        self._down = weight.new_zeros(self._first + rank, base.in_features)
        self._up = weight.new_zeros(base.out_features, self._first + rank)
        if frozen:
            self._down[: self._first] = frozen[0]
            self._up[:, : self._first] = frozen[1]
        self._copied: tuple[int, ...] = ()

    def insert_core(self) -> torch.nn.Parameter:
        """Put the identity between A and B, to be trained in their place."""
        self.core = torch.nn.Parameter(torch.eye(len(self.a), device=self.a.device))
        return self.core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.silent:
            return self.base(x)  # type: ignore[no-any-return]
        self._copy()
        y: torch.Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
            x, self.a, self.b, self.core, self.base.weight, self.base.bias, self._down, self._up
        )
        return y

    @torch.no_grad()
    def _copy(self) -> None:
        """Bring the copies up to date."""
        moving = (self.a, self.b) if self.core is None else (self.a, self.b, self.core)
        versions = tuple(tensor._version for tensor in moving)
        if versions != self._copied:
            self._down[self._first :] = self.a
            self._up[:, self._first :] = self.b if self.core is None else self.b @ self.core
            self._copied = versions


class _LowRank(torch.autograd.Function):
    """y = x Wᵀ + bias + (x Downᵀ) Upᵀ; the last rows of Down are A, the last columns of Up are B, or B · core."""

    @staticmethod
    def forward(  # noqa: PLR0917  autograd hands over by position
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        core: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        u = flat @ down.T
        y = torch.nn.functional.linear(flat, weight, bias).addmm_(u, up.T)
        ctx.save_for_backward(flat, u, b, weight, down, up)
        ctx.shape, ctx.rank = x.shape, len(a)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, u, b, weight, down, up = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_core = ctx.needs_input_grad[:4]
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        of_x = of_a = of_b = of_core = None
        if needs_x or needs_a:
            of_u = grad @ up
        if needs_x:
            of_x = (grad @ weight).addmm_(of_u, down).view(ctx.shape)
        if needs_a:
            of_a = (of_u[:, -ctx.rank :].T @ flat).float()
        if needs_b or needs_core:
            of_up = (u[:, -ctx.rank :].T @ grad).T.float()
            of_b = of_up if needs_b else None
            of_core = b.T @ of_up if needs_core else None
        return of_x, of_a, of_b, of_core, None, None, None, None
