"""A GPU that is none: tensors on the device `card`, which compute on the CPU and count what their host waits for.

As on a GPU, an operation on tensors of two devices is an error. It is PyTorch's device for backends in Python, which a
process keeps once it has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CARD = "card"
_kernels = torch.library.Library("aten", "IMPL")
COPIES = {"aten::_to_copy", "aten::copy_"}


class OnCard(torch.Tensor):
    inner: torch.Tensor  # on the CPU

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        like: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        like |= {"dtype": inner.dtype, "device": torch.device(CARD, 0)}
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **like)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{func} of a tensor on the card, which is not active")


class Card(TorchDispatchMode):
    """While it is active, tensors can be on the device `card`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = Counter[str]()  # by the operation's name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, returns = dict(kwargs or {}), func._schema.name, func._schema.returns
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        here = [isinstance(each, OnCard) for each in tensors]
        if name not in COPIES and any(here) and any(each.dim() for each in tensors if not isinstance(each, OnCard)):
            raise RuntimeError(f"{name} of tensors on two devices: {[(each.device, each.shape) for each in tensors]}")
        device = kwargs.get("device")
        stays = here[0] if name == "aten::copy_" else any(here) if device is None else device.type == CARD
        if any(here) and (name == "aten::_local_scalar_dense" or (name in COPIES and not stays)):
            self.waits[name] += 1
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        args_on_cpu, kwargs_on_cpu = tree_map_only(OnCard, lambda each: each.inner, (args, kwargs))
        made = func(*args_on_cpu, **kwargs_on_cpu)
        if not returns:
            return None
        if returns[0].alias_info and returns[0].alias_info.is_write:  # in place
            return kwargs.get("out", args[0])
        return tree_map_only(torch.Tensor, OnCard, made) if stays else made


def register() -> None:
    """Let this process have the card; it must not have taken any gradient before."""
    _setup_privateuseone_for_python_backend(CARD)
    for name, kernel in (("empty_strided", _empty), ("_copy_from", _copy)):  # of `torch.tensor`, which asks no `Card`
        _kernels.impl(name, kernel, "PrivateUse1")


def _empty(size: Sequence[int], stride: Sequence[int], dtype: Any = None, **_: Any) -> OnCard:
    return OnCard(torch.empty_strided(size, stride, dtype=dtype))


def _copy(source: torch.Tensor, target: OnCard, *_: Any) -> OnCard:
    target.inner.copy_(source)
    return target


@contextmanager
def on_gpu(model: torch.nn.Module) -> Iterator[Counter[str] | None]:
    """Move a model to the GPU, if there is one, or to the card, and back; yield what the card's host waits for."""
    if torch.cuda.is_available():
        model.to("cuda")
        try:
            yield None
        finally:
            model.to("cpu")
        return
    held = [
        (owner, name, tensor)
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]
    with Card() as card:
        for owner, name, tensor in held:
            there = OnCard(tensor.detach())
            owner[name] = (
                torch.nn.Parameter(there, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else there
            )
        try:
            yield card.waits
        finally:
            for owner, name, tensor in held:
                owner[name] = tensor
