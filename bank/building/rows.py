"""All rows of a bank, trained or taken from an earlier run that was killed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from adapters.errors import FusionError
from adapters.layout import RowLayout
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionMethod, anchor_id
from adapters.training.trainer import StepReport, TrainPlan, linear_modules
from bank.building.options import BuildOptions
from bank.building.resume import Workbench
from bank.building.training import COMMON, RowJob, RowTrainer, row_job, row_seed
from bank.errors import BankError
from bank.items.histories import History
from bank.items.lessons import Lesson, lessons
from bank.items.tasks import Task


class RowProgress(Protocol):
    """Is told how far training has come."""

    def say(self, text: str) -> None:
        """Something is happening, or has happened."""

    def begin(self, work_tokens: Mapping[str, int]) -> None:
        """Rows still to be trained, in order, with about how many ids each will read."""

    def step(self, row: str, steps: int, report: StepReport) -> None:
        """One step of a row is done."""

    def piece(self, what: str, done: int, of: int) -> None:
        """Other long work is at piece `done` of `of`; told first when it begins, then after each piece."""


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """The rows that training made.

    Attributes:
        layout: how a row is cut.
        rows: flat, in anchor order, then the common row if there is one.
        shared_a: the one A of a `shared` bank, flat.
    """

    layout: RowLayout
    rows: list[torch.Tensor]
    shared_a: torch.Tensor | None

    def matrix(self, anchors: int) -> MetaMatrix:
        """The rows as they will be served: rounded to bf16."""
        rows = torch.stack([row.to(torch.bfloat16) for row in self.rows])
        shared_a = self.shared_a.to(torch.bfloat16) if self.shared_a is not None else None
        return MetaMatrix(self.layout, rows, anchors, len(rows) > anchors, shared_a)


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
    """Train the common row on everybody's pairs, then one row per anchor on its own; finished rows are not repeated.

    Raises:
        BankError: when the base model lacks a target module.
    """
    try:
        modules = linear_modules(model, options.target_modules)
    except FusionError as error:
        raise BankError(f"--target-modules: {error}") from error
    layout = RowLayout(modules, options.rank, options.method is FusionMethod.SHARED)
    trainer = RowTrainer(model, layout, options.method, options.seed)
    jobs = _jobs(tokenizer, people, anchors, task, options)
    waiting = [job for job in jobs if not work.has_row(job.name)]
    if len(waiting) < len(jobs):
        progress.say(f"{len(jobs) - len(waiting)} of {len(jobs)} rows are there from an earlier run")
    progress.begin({job.name: job.work_tokens for job in waiting})
    for job in jobs:
        if not work.has_row(job.name):
            work.save_row(job.name, _train(trainer, job, progress))
        if job.name == COMMON:
            trainer.use_common(work.load_row(COMMON))
    return TrainedRows(layout, _collect(work, layout, jobs), trainer.shared_a)


def _train(trainer: RowTrainer, job: RowJob, progress: RowProgress) -> dict[str, torch.Tensor]:
    def on_step(report: StepReport) -> None:
        progress.step(job.name, job.plan.steps, report)

    return trainer.train_common(job, on_step) if job.name == COMMON else trainer.train_anchor(job, on_step)


def _jobs(
    tokenizer: Any, people: Sequence[History], anchors: Sequence[History], task: Task, options: BuildOptions
) -> list[RowJob]:
    """The common row first: the anchors train on top of it."""
    rows = {COMMON: pooled_lessons(people, task, options)} if options.common else {}
    rows |= {anchor_id(index): pooled_lessons([person], task, options) for index, person in enumerate(anchors)}
    return [
        row_job(name, learnt, _plan(name, len(learnt), options), tokenizer, options.max_tokens)
        for name, learnt in rows.items()
    ]


def pooled_lessons(people: Sequence[History], task: Task, options: BuildOptions) -> list[Lesson]:
    """Everybody's items to learn from, one person after the other."""
    return [lesson for person in people for lesson in lessons(person, task, options.history_share or 0.0, options.seed)]


def _plan(name: str, items: int, options: BuildOptions) -> TrainPlan:
    seed = row_seed(options.seed, name)
    if name != COMMON:
        return TrainPlan(anchor_steps(options, items), options.batch_size, options.learning_rate, seed)
    steps = _steps(options, options.common_steps, options.common_batch_size, items)
    return TrainPlan(steps, options.common_batch_size, options.common_learning_rate, seed)


def anchor_steps(options: BuildOptions, items: int) -> int:
    """How many steps an anchor with `items` items is trained for."""
    return _steps(options, options.steps, options.batch_size, items)


def _steps(options: BuildOptions, steps: int, batch_size: int, items: int) -> int:
    return steps if options.epochs is None else max(1, math.ceil(options.epochs * items / batch_size))


def _collect(work: Workbench, layout: RowLayout, jobs: Sequence[RowJob]) -> list[torch.Tensor]:
    """Rows as the matrix takes them: `[A | B]`, or `[B]` where A is shared; the common row last."""
    ordered = sorted(jobs, key=lambda job: job.name == COMMON)
    loaded = [work.load_row(job.name) for job in ordered]
    for job, row in zip(ordered, loaded, strict=True):
        if not all(numbers.isfinite().all() for numbers in row.values()):
            raise BankError(f"training {job.name} went wrong: its numbers are not finite; try a lower --learning-rate")
    return [row["b"] if layout.shared_a else torch.cat([row["a"], row["b"]]) for row in loaded]
