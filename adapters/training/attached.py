"""Attaching LoRAs to a base model for training, with PEFT's layers, and detaching them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.lora import LoraWeights

TRAINED = "trained"
"""Name of the only adapter that PEFT sees."""


class Attached:
    """A base model that carries a LoRA to train, and maybe a frozen one beside it.

    PEFT sees one adapter that holds both, the frozen part first: with two, a step would take an eighth longer.

    Attributes:
        model: PEFT's wrapper around the base model.
    """

    def __init__(self, model: Any, trained: LoraWeights, frozen: LoraWeights | None) -> None:
        self.model = model
        self._rank = trained.rank
        self._frozen_rank = frozen.rank if frozen else 0
        if frozen:
            self._put(frozen, 0)
        self.put(trained)

    def layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers by the name of the module they wrap."""
        from peft.tuners.lora import LoraLayer

        return {n: module for n, module in self.model.base_model.model.named_modules() if isinstance(module, LoraLayer)}

    def put(self, lora: LoraWeights) -> None:
        """Set the weights of the LoRA to train."""
        self._put(lora, self._frozen_rank)

    def _put(self, lora: LoraWeights, first: int) -> None:
        part = slice(first, first + lora.rank)
        with torch.no_grad():
            for name, layer in self.layers().items():
                layer.lora_A[TRAINED].weight[part].copy_(lora.a[name])
                layer.lora_B[TRAINED].weight[:, part].copy_(lora.b[name])

    def trainable(self, *, train_a: bool) -> list[torch.nn.Parameter]:
        """Freeze all but the trained LoRA's B (and its A with `train_a`), and return the parameters that move.

        The gradient of their frozen part is zeroed, so that an optimiser without weight decay leaves it alone.
        """
        moving: list[tuple[torch.nn.Parameter, int]] = []
        for layer in self.layers().values():
            moving.append((layer.lora_B[TRAINED].weight, 1))
            moving += [(layer.lora_A[TRAINED].weight, 0)] if train_a else []
        chosen = self.only([parameter for parameter, _ in moving])
        if self._frozen_rank:
            for parameter, ranks in moving:
                hook = _still(parameter, ranks, self._frozen_rank)
                parameter.register_hook(hook)  # type: ignore[no-untyped-call]
        return chosen

    def only(self, chosen: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Freeze everything but these."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        self.model.eval()  # dropout of the base would make the loss noisy and the result depend on global state
        return chosen

    def insert_cores(self) -> list[torch.nn.Parameter]:
        """Put 1 + C, with C zero, between A and B of the trained LoRA, freeze all else, and return what moves."""
        chosen: list[torch.nn.Parameter] = []
        for layer in self.layers().values():
            b = layer.lora_B[TRAINED]
            core = torch.nn.Linear(self._rank, self._rank, bias=False, device=b.weight.device, dtype=b.weight.dtype)
            torch.nn.init.eye_(core.weight)
            layer.lora_B[TRAINED] = torch.nn.Sequential(core, b)
            chosen += core.parameters()
        return self.only(chosen)

    def cores(self) -> dict[str, torch.Tensor]:
        """C [R, R] of every module as it is now, float32 on CPU."""
        one = torch.eye(self._rank)
        return {name: layer.lora_B[TRAINED][0].weight.detach().cpu() - one for name, layer in self.layers().items()}

    def weights(self) -> LoraWeights:
        """The trained LoRA as it is now, float32 on CPU."""
        part = slice(self._frozen_rank, None)
        a = {name: layer.lora_A[TRAINED].weight[part] for name, layer in self.layers().items()}
        b = {name: layer.lora_B[TRAINED].weight[:, part] for name, layer in self.layers().items()}
        return LoraWeights(self._rank, _taken(a), _taken(b))


@contextmanager
def attached(model: Any, trained: LoraWeights, frozen: LoraWeights | None = None) -> Iterator[Attached]:
    """Attach a LoRA to train and, if given, a frozen one beside it; afterwards the model is as it was.

    Args:
        model: a Hugging Face causal language model.
        trained: where training starts, and which modules it adapts.
        frozen: a LoRA that is active but does not move, or None.
    """
    from peft import get_peft_model

    rank = trained.rank + (frozen.rank if frozen else 0)
    peft_model = get_peft_model(model, _config(rank, list(trained.a)), adapter_name=TRAINED)
    try:
        yield Attached(peft_model, trained, frozen)
    finally:
        peft_model.unload()


def _config(rank: int, modules: list[str]) -> Any:
    """PEFT's configuration for LoRAs whose scaling is folded into B: alpha equals the rank."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, init_lora_weights=False)


def _still(parameter: torch.Tensor, ranks: int, frozen_rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that zeroes the gradient of the first `frozen_rank` places along the dimension `ranks`."""
    shape = [1, 1]
    shape[ranks] = parameter.shape[ranks]
    moves = torch.ones(shape, dtype=parameter.dtype, device=parameter.device)
    moves.narrow(ranks, 0, frozen_rank).zero_()
    return lambda gradient: gradient * moves


def _taken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}
