"""Training a bank's rows: the common row on everybody's pooled data, then each anchor on top of it.

In a `shared` bank all rows have one A: the common row's, or a random one if there is no common row. An anchor then
starts at the common B and trains B alone, and its row is the change in B. In the other banks an anchor is a LoRA of
its own, trained beside the frozen common row. Rows build on the common row as it is stored, rounded to bf16.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.flat import flat_a, flat_b, lora_of
from adapters.layout import RowLayout
from adapters.lora import LoraWeights
from adapters.recipe import FusionMethod
from adapters.training.example import Example
from adapters.training.trainer import StepReport, TrainPlan, initial_lora, train_lora
from bank.items.lessons import Lesson

COMMON = "common"

OnStep = Callable[[StepReport], None]


@dataclass(frozen=True, slots=True)
class RowJob:
    """One row to train.

    Attributes:
        name: `common`, or an anchor's id.
        examples: what it is trained on.
        plan: how.
    """

    name: str
    examples: tuple[Example, ...]
    plan: TrainPlan

    @property
    def work_tokens(self) -> int:
        """About how many ids training will read."""
        mean = sum(len(example.ids) for example in self.examples) / len(self.examples)
        return round(self.plan.steps * self.plan.batch_size * mean)


class RowTrainer:
    """Trains rows on one base model.

    Args:
        model: the base model.
        layout: modules and rank, and whether A is shared.
        method: the bank's.
        seed: the bank's; it decides where A starts.
    """

    def __init__(self, model: Any, layout: RowLayout, method: FusionMethod, seed: int) -> None:
        self._model = model
        self._layout = layout
        self._method = method
        start = initial_lora(layout.modules, layout.rank, row_seed(seed, "A"))
        self._start = lora_of(layout, stored(flat_a(layout, start)), flat_b(layout, start))
        self._common: LoraWeights | None = None

    def train_common(self, job: RowJob, on_step: OnStep) -> dict[str, torch.Tensor]:
        """The common row as `{"a", "b"}`, flat."""
        trained = train_lora(self._model, job.examples, job.plan, start=self._start, on_step=on_step)
        return {"a": flat_a(self._layout, trained), "b": flat_b(self._layout, trained)}

    def use_common(self, row: dict[str, torch.Tensor]) -> None:
        """Put the anchors that follow on top of a common row."""
        self._common = lora_of(self._layout, stored(row["a"]), stored(row["b"]))

    def train_anchor(self, job: RowJob, on_step: OnStep) -> dict[str, torch.Tensor]:
        """An anchor's row as `{"b"}` in a `shared` bank, `{"a", "b"}` in others, flat."""
        if self._method is not FusionMethod.SHARED:
            lora = train_lora(
                self._model, job.examples, job.plan, start=self._start, frozen=self._common, on_step=on_step
            )
            return {"a": flat_a(self._layout, lora), "b": flat_b(self._layout, lora)}
        start = self._common or self._start
        lora = train_lora(self._model, job.examples, job.plan, start=start, train_a=False, on_step=on_step)
        return {"b": flat_b(self._layout, lora) - flat_b(self._layout, start)}

    @property
    def shared_a(self) -> torch.Tensor | None:
        """The one A of a `shared` bank, flat."""
        return flat_a(self._layout, self._common or self._start) if self._method is FusionMethod.SHARED else None


def stored(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers as the bank keeps them: float32 with bf16 precision."""
    return numbers.to(torch.bfloat16).float()


def row_seed(seed: int, name: str) -> int:
    """A seed of its own for each row, so that a row never depends on which others were trained in the same run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4])


def row_job(name: str, lessons: Sequence[Lesson], plan: TrainPlan, tokenizer: Any, max_tokens: int) -> RowJob:
    """A row's examples: no more than training will read, chosen by the plan's seed.

    Args:
        name: the row.
        lessons: at least one.
        plan: how it is trained.
        tokenizer: the base model's, with a chat template.
        max_tokens: longest example.
    """
    wanted = min(len(lessons), plan.steps * plan.batch_size)
    chosen = random.Random(plan.seed).sample(range(len(lessons)), wanted)
    return RowJob(name, tuple(lessons[i].example(tokenizer, max_tokens) for i in chosen), plan)
