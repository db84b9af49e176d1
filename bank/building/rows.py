"""Train a bank's rows: the common row on everybody's data, then each anchor's row on its own data, on top of it.

All rows share the common row's A. An anchor's training starts at the stored common B, rounded to bf16, and changes B
only; the anchor's row is the change in B.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from adapters.errors import FusionError
from adapters.flat import flat_a, flat_b, lora_of
from adapters.lora import LoraWeights, RowLayout
from adapters.matrix import MetaMatrix
from adapters.recipe import anchor_id
from adapters.training.example import Example
from adapters.training.trainer import StepReport, TrainPlan, initial_lora, linear_modules, train_lora
from bank.building.options import BuildOptions
from bank.building.resume import Workbench
from bank.errors import BankError
from bank.items.histories import History
from bank.items.lessons import Lesson, lessons
from bank.items.tasks import Task

COMMON = "common"


class RowProgress(Protocol):
    def say(self, text: str) -> None:
        """Show a message."""

    def begin(self, work_tokens: Mapping[str, int]) -> None:
        """Start training the rows, in this order; the values are approximate numbers of token ids to read."""

    def step(self, row: str, steps: int, report: StepReport) -> None: ...

    def piece(self, what: str, done: int, of: int) -> None:
        """Show progress of other long work: called at its start and after each piece."""


@dataclass(frozen=True, slots=True)
class RowJob:
    """One row to train: its name (`common` or an anchor's id), its examples and its training plan."""

    name: str
    examples: tuple[Example, ...]
    plan: TrainPlan

    @property
    def work_tokens(self) -> int:
        """Approximate number of token ids that training will read."""
        mean = sum(len(example.ids) for example in self.examples) / len(self.examples)
        return round(self.plan.steps * self.plan.batch_size * mean)


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """Trained rows, flat: B of each anchor in order, then B of the common row; and the shared A."""

    layout: RowLayout
    rows: list[torch.Tensor]
    shared_a: torch.Tensor

    def matrix(self) -> MetaMatrix:
        """Return the rows as they will be served: rounded to bf16."""
        rows = torch.stack([row.to(torch.bfloat16) for row in self.rows])
        return MetaMatrix(self.layout, rows, len(rows) - 1, True, self.shared_a.to(torch.bfloat16))


def train_rows(
    work: Workbench,
    *,
    model: Any,
    tokenizer: Any,
    people: Sequence[History],
    anchors: Sequence[History],
    task: Task,
    options: BuildOptions,
    progress: RowProgress,
) -> TrainedRows:
    """Train the common row, then one row per anchor; skip rows that an earlier run finished."""
    try:
        modules = linear_modules(model, options.target_modules)
    except FusionError as error:
        raise BankError(f"--target-modules: {error}") from error
    layout = RowLayout(modules, options.rank, shared_a=True)
    jobs = _jobs(tokenizer, people, anchors, task, options)
    waiting = [job for job in jobs if not work.has(job.name)]
    if len(waiting) < len(jobs):
        progress.say(f"{len(jobs) - len(waiting)} of {len(jobs)} rows were finished in an earlier run")
    progress.begin({job.name: job.work_tokens for job in waiting})

    def trained(job: RowJob, start: LoraWeights, *, train_a: bool) -> LoraWeights:
        def on_step(report: StepReport) -> None:
            progress.step(job.name, job.plan.steps, report)

        return train_lora(model, job.examples, job.plan, start=start, train_a=train_a, on_step=on_step)

    def row(job: RowJob, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        found = torch.from_numpy(work.vectors(job.name, lambda: make().numpy()))
        if not found.isfinite().all():
            raise BankError(f"training {job.name} diverged: the weights are not finite; try a lower --learning-rate")
        return found

    def common_row() -> torch.Tensor:
        start = initial_lora(layout.modules, layout.rank, row_seed(options.seed, "A"))
        start = lora_of(layout, _stored(flat_a(layout, start)), flat_b(layout, start))
        lora = trained(jobs[0], start, train_a=True)
        return torch.cat([flat_a(layout, lora), flat_b(layout, lora)])

    a, b = torch.split(row(jobs[0], common_row), [layout.a_numbers, layout.b_numbers])
    common = lora_of(layout, _stored(a), _stored(b))

    def anchor_row(job: RowJob) -> torch.Tensor:
        return flat_b(layout, trained(job, common, train_a=False)) - flat_b(layout, common)

    rows = [row(job, partial(anchor_row, job)) for job in jobs[1:]]
    return TrainedRows(layout, [*rows, b], flat_a(layout, common))


def _jobs(
    tokenizer: Any, people: Sequence[History], anchors: Sequence[History], task: Task, options: BuildOptions
) -> list[RowJob]:
    common = (options.common_steps, options.common_batch_size)
    each = (options.steps, options.batch_size)
    wanted = [(COMMON, people, common), *((anchor_id(i), [person], each) for i, person in enumerate(anchors))]
    jobs = []
    for name, who, (steps, batch_size) in wanted:
        plan = TrainPlan(steps, batch_size, options.learning_rate, row_seed(options.seed, name))
        jobs.append(row_job(name, pooled_lessons(who, task, options), plan, tokenizer, options.max_tokens))
    return jobs


def pooled_lessons(people: Sequence[History], task: Task, options: BuildOptions) -> list[Lesson]:
    return [lesson for person in people for lesson in lessons(person, task, options.history_share, options.seed)]


def row_job(name: str, lessons: Sequence[Lesson], plan: TrainPlan, tokenizer: Any, max_tokens: int) -> RowJob:
    """Choose a row's examples from its lessons (at least one) by the plan's seed, at most as many as training reads."""
    wanted = min(len(lessons), plan.steps * plan.batch_size)
    chosen = random.Random(plan.seed).sample(range(len(lessons)), wanted)
    return RowJob(name, tuple(lessons[i].example(tokenizer, max_tokens) for i in chosen), plan)


def row_seed(seed: int, name: str) -> int:
    """Derive a separate seed per row, so that a row does not depend on the other rows trained in the same run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4])


def _stored(numbers: torch.Tensor) -> torch.Tensor:
    """Round numbers to the bank's stored precision, bf16, and return them as float32."""
    return numbers.to(torch.bfloat16).float()
