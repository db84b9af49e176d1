"""LoRAs attached to a base model for training, by PEFT's layers, and detached again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.lora import LoraWeights

TRAINED = "trained"
FROZEN = "frozen"


class Attached:
    """A base model that carries LoRAs.

    Attributes:
        model: PEFT's wrapper around the base model.
    """

    def __init__(self, model: Any, rank: int) -> None:
        self.model = model
        self._rank = rank

    def layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers by the name of the module they wrap."""
        from peft.tuners.lora import LoraLayer

        return {n: module for n, module in self.model.base_model.model.named_modules() if isinstance(module, LoraLayer)}

    def put(self, adapter: str, lora: LoraWeights) -> None:
        """Set the weights of one of the attached LoRAs."""
        with torch.no_grad():
            for name, layer in self.layers().items():
                layer.lora_A[adapter].weight.copy_(lora.a[name])
                layer.lora_B[adapter].weight.copy_(lora.b[name])

    def trainable(self, *, train_a: bool) -> list[torch.nn.Parameter]:
        """Freeze everything but the trained LoRA's B, and its A where that moves too; give what moves."""
        chosen = []
        for layer in self.layers().values():
            chosen += [layer.lora_B[TRAINED].weight] + ([layer.lora_A[TRAINED].weight] if train_a else [])
        return self.only(chosen)

    def only(self, chosen: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Freeze everything but these."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        self.model.eval()  # dropout of the base would make the loss noisy and the result depend on global state
        return chosen

    def insert_cores(self) -> list[torch.nn.Parameter]:
        """Put 1 + C, with C zero, between A and B of the trained LoRA, freeze everything else, and give what moves."""
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
        layers = self.layers()
        return LoraWeights(
            rank=self._rank,
            a={name: layer.lora_A[TRAINED].weight.detach().float().cpu().clone() for name, layer in layers.items()},
            b={name: layer.lora_B[TRAINED].weight.detach().float().cpu().clone() for name, layer in layers.items()},
        )


@contextmanager
def attached(model: Any, trained: LoraWeights, frozen: LoraWeights | None = None) -> Iterator[Attached]:
    """Attach a LoRA to train, and another that is active meanwhile; the model is left as it was.

    Args:
        model: a Hugging Face causal language model.
        trained: where training starts, and which modules it adapts.
        frozen: the other one, or None.
    """
    from peft import get_peft_model

    peft_model = get_peft_model(model, _config(trained), adapter_name=TRAINED)
    try:
        here = Attached(peft_model, trained.rank)
        here.put(TRAINED, trained)
        if frozen is not None:
            peft_model.add_adapter(FROZEN, _config(frozen))
            here.put(FROZEN, frozen)
            peft_model.base_model.set_adapter([TRAINED, FROZEN])
        yield here
    finally:
        peft_model.unload()


def _config(lora: LoraWeights) -> Any:
    """PEFT's configuration for a LoRA whose scaling is folded: alpha equals the rank."""
    from peft import LoraConfig

    return LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=list(lora.a), init_lora_weights=False)
