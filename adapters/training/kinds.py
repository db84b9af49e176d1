"""The kinds of user adapters while they train: how each is attached, what moves, where it starts and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from adapters.lora import LoraWeights, ModuleShape
from adapters.training.attached import Attached, attached
from adapters.training.forward.below import Below, layer_of, upper_half
from adapters.training.trainer import initial_lora
from adapters.user_adapter import CoreWeights, UserAdapterKind

UPPER_PACE = 1.75
"""With it the upper half of the layers learns in eight steps about what all learn at the planned rate: with 1.9 on
headlines, with 1.7 on mails."""


class InTraining(Protocol):
    """A user adapter on a model.

    Attributes:
        model: the base model with the fused adapter and the user's.
        parameters: what moves; everything else is frozen.
        below: the layers below those that move, where there are any.
        pace: what the planned rate is multiplied by.
    """

    model: Any
    parameters: list[torch.nn.Parameter]
    below: Below | None
    pace: float

    def reset(self) -> None:
        """Back to the start, where the user adapter changes nothing."""

    def weights(self) -> LoraWeights | CoreWeights:
        """What it is now, float32 on CPU."""


class LoraInTraining:
    """A LoRA beside the fused adapter, in the upper half of the layers where that can run alone.

    It then takes half the time. A starts random, B at zero.
    """

    def __init__(self, here: Attached, start: LoraWeights, modules: Sequence[ModuleShape], below: Below | None) -> None:
        self.model = here.model
        self.parameters = here.trainable(train_a=True)
        self.below = below
        self.pace = UPPER_PACE if below else 1.0
        self._here, self._start, self._modules = here, start, modules

    def reset(self) -> None:
        self._here.put(self._start)

    def weights(self) -> LoraWeights:
        made, rank = self._here.weights(), self._start.rank
        a = {m.name: made.a.get(m.name, torch.zeros(rank, m.h_in)) for m in self._modules}
        b = {m.name: made.b.get(m.name, torch.zeros(m.h_out, rank)) for m in self._modules}
        return LoraWeights(rank, a, b)


class CoreInTraining:
    """C between the fused adapter's A and B; 1 + C is what moves, and starts at 1."""

    below: Below | None = None
    pace = 1.0

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
        half = upper_half(model, fused.a)
        moving = modules if half is None else [m for m in modules if layer_of(m.name) >= half[1]]
        start = initial_lora(moving, rank, seed)
        with attached(model, start, frozen=fused) as here:
            below = None if half is None else Below(model, model.get_submodule(half[0]), half[1])
            yield LoraInTraining(here, start, modules, below)
