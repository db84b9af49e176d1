"""The kinds of user adapters while they train: how each is attached, what moves, where it starts and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from adapters.lora import LoraWeights, ModuleShape
from adapters.training.attached import Attached, attached
from adapters.training.trainer import initial_lora
from adapters.user_adapter import CoreWeights, UserAdapterKind


class InTraining(Protocol):
    """A user adapter on a model.

    Attributes:
        model: the base model with the fused adapter and the user's.
        parameters: what moves; everything else is frozen.
    """

    model: Any
    parameters: list[torch.nn.Parameter]

    def reset(self) -> None:
        """Back to the start, where the user adapter changes nothing."""

    def weights(self) -> LoraWeights | CoreWeights:
        """What it is now, float32 on CPU."""


class LoraInTraining:
    """A LoRA beside the fused adapter. A starts random, B at zero."""

    def __init__(self, here: Attached, start: LoraWeights) -> None:
        self.model = here.model
        self.parameters = here.trainable(train_a=True)
        self._here, self._start = here, start

    def reset(self) -> None:
        self._here.put(self._start)

    def weights(self) -> LoraWeights:
        return self._here.weights()


class CoreInTraining:
    """C between the fused adapter's A and B; 1 + C is what moves, and starts at 1."""

    def __init__(self, here: Attached) -> None:
        self.model = here.model
        self.parameters = here.insert_cores()
        self._here = here

    def reset(self) -> None:
        for parameter in self.parameters:
            torch.nn.init.eye_(parameter)

    def weights(self) -> CoreWeights:
        cores = self._here.cores()
        return CoreWeights(next(iter(cores.values())).shape[0], cores)


@contextmanager
def in_training(model: Any, fused: LoraWeights, kind: UserAdapterKind, rank: int, seed: int) -> Iterator[InTraining]:
    """Attach a new user adapter on top of a fused one; the model is left as it was.

    Args:
        model: a Hugging Face causal language model.
        fused: what the user's recipe stands for, float32; it does not move.
        kind: of the user adapter.
        rank: R_u of a `lora`; a `core` has the fused adapter's.
        seed: of where a `lora` starts.
    """
    if kind is UserAdapterKind.CORE:
        with attached(model, fused) as here:
            yield CoreInTraining(here)
    else:
        modules = [ModuleShape(name, a.shape[1], fused.b[name].shape[0]) for name, a in fused.a.items()]
        start = initial_lora(modules, rank, seed)
        with attached(model, start, frozen=fused) as here:
            yield LoraInTraining(here, start)
