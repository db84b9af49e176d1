"""Train a bank's rows: the common row on everybody's data, then each anchor's row on its own data, on top of it.

All rows share the common row's A. An anchor's training starts at the stored common B, rounded to bf16, and changes B
only; the anchor's row is the change in B.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch

from adapters.errors import FusionError
from adapters.flat import flattened, lora_of
from adapters.lora import LoraWeights, RowLayout
from adapters.matrix import MetaMatrix
from adapters.recipe import anchor_id
from adapters.training.example import Acts, Example, output_tokens
from adapters.training.forward.packing import Row, pack
from adapters.training.forward.shared_part import SharedPart
from adapters.training.loss import backward, backward_row
from adapters.training.trainer import Gradient, TrainPlan, initial_lora, linear_modules, train_lora
from bank.building.options import BuildOptions
from bank.building.progress import RowProgress
from bank.building.ranks import Ranks
from bank.building.resume import Workbench
from bank.errors import BankError
from bank.items.histories import History
from bank.items.lessons import lessons
from bank.items.profile import Vectors
from bank.items.tasks import Task


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
class RowTrainer:
    model: Any
    tokenizer: Any
    task: Task
    options: BuildOptions
    progress: RowProgress

    def rows(self, work: Workbench, people: Sequence[History], anchors: Sequence[History]) -> MetaMatrix:
        """Train the common row, then one row per anchor; skip rows that an earlier run finished."""
        options = self.options
        try:
            modules = linear_modules(self.model, options.target_modules)
        except FusionError as error:
            raise BankError(f"--target-modules: {error}") from error
        if options.acts is not Acts.EVERYWHERE and getattr(self.model, "_is_stateful", False):
            raise BankError(f"--acts {options.acts}: this base model keeps no keys and values; it needs everywhere")
        layout = RowLayout(modules, options.rank, shared_a=True)
        first = self.job("common", people, options.common_steps, options.common_batch_size)
        waiting, finished = work.waiting([first.name]), min(work.finished_rows(layout.row_numbers), len(anchors))
        if not waiting:
            self.progress.say(f"{1 + finished} of {1 + len(anchors)} rows were finished in an earlier run")
        own = range(finished, len(anchors))[work.ranks.rank :: work.ranks.count]
        jobs = (self._anchor_job(position, anchors) for position in own)
        self.progress.begin({job.name: job.work_tokens for job in chain([first] if waiting else [], jobs)})
        made = [self._common_row(layout, first, work.ranks) for _ in waiting]  # by all ranks together
        (numbers,) = map(torch.from_numpy, work.pieces([first.name], made.__getitem__))
        a, b = torch.split(numbers, [layout.a_numbers, layout.b_numbers])
        common = lora_of(layout, _stored(a), _stored(b))

        def make(position: int) -> torch.Tensor:
            if position == len(anchors):
                return b
            trained = self.train(
                self._anchor_job(position, anchors), common, shared=SharedPart(self.options.acts, common)
            )
            return (flattened(layout, trained.b) - flattened(layout, common.b)).to(torch.bfloat16)

        rows = work.rows(len(anchors) + 1, layout.row_numbers, make)
        return MetaMatrix(layout, rows, len(anchors), True, a.to(torch.bfloat16))

    def _anchor_job(self, position: int, anchors: Sequence[History]) -> RowJob:
        return self.job(anchor_id(position), [anchors[position]], self.options.steps, self.options.batch_size)

    def job(self, name: str, people: Sequence[History], steps: int, batch_size: int) -> RowJob:
        """Choose a row's examples, at most as many as training reads; with its own seed it depends on no other row."""
        options, seed = self.options, _row_seed(self.options.seed, name)
        pool = [each for person in people for each in lessons(person, self.task, options.history_share, options.seed)]
        chosen = random.Random(seed).sample(range(len(pool)), min(len(pool), steps * batch_size))
        examples = tuple(pool[i].example(self.tokenizer, options.max_tokens) for i in chosen)
        if not output_tokens(examples):
            raise BankError(f"--max-tokens {options.max_tokens} leaves no room for answers in the chat template")
        return RowJob(name, examples, TrainPlan(steps, batch_size, options.learning_rate, seed))

    def train(
        self, job: RowJob, start: LoraWeights, *, shared: SharedPart | None = None, gradient: Gradient = backward
    ) -> LoraWeights:
        """Train the common row, or with a `shared` part an anchor's, which keeps its A; BankError if not finite."""
        lora = train_lora(
            self.model,
            job.examples,
            job.plan,
            start=start,
            train_a=shared is None,
            on_step=partial(self.progress.step, job.name, job.plan.steps),
            gradient=gradient,
            shared=shared,
        )
        if not all(bool(weights.isfinite().all()) for weights in (*lora.a.values(), *lora.b.values())):
            raise BankError(f"training {job.name} diverged: the weights are not finite; try a lower --learning-rate")
        return lora

    def _common_row(self, layout: RowLayout, job: RowJob, ranks: Ranks) -> Vectors:
        """Return A and B of the common row, flat; all ranks train it together."""
        start = initial_lora(layout.modules, layout.rank, _row_seed(self.options.seed, "A"))
        start = lora_of(layout, _stored(flattened(layout, start.a)), flattened(layout, start.b))
        gradient = backward if ranks.count == 1 else partial(_shared_backward, ranks)
        lora = self.train(job, start, gradient=gradient)
        return torch.cat([flattened(layout, lora.a), flattened(layout, lora.b)]).numpy()


def _shared_backward(ranks: Ranks, model: Any, examples: Sequence[Example]) -> Iterator[torch.Tensor]:
    """Do the same as `backward`, with packed rows shared among the ranks; their number does not change the sums."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs, sums = output_tokens(examples), list[torch.Tensor]()

    def gradients(row: Row) -> tuple[torch.Tensor, list[torch.Tensor]]:
        for parameter in parameters:
            parameter.grad = None
        row_loss = backward_row(model, row, outputs)
        return row_loss.cpu(), [parameter.grad.cpu() for parameter in parameters if parameter.grad is not None]

    for row_loss, of_row in ranks.each(pack(model, examples), gradients):
        yield row_loss
        sums = [one + other for one, other in zip(sums, of_row, strict=True)] if sums else of_row
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient.to(parameter.device)


def _row_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4])


def _stored(numbers: torch.Tensor) -> torch.Tensor:
    """Round numbers to the bank's stored precision, bf16, and return them as float32."""
    return numbers.to(torch.bfloat16).float()
