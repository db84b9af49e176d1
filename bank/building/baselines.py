"""The task's row, for evaluation: the common row, trained further on everybody's data for as long as all anchors took.

A bank's anchors also teach the task; what they bring beyond that is measured against this row. It is kept in a folder
inside the bank's, as a bank with this common row and one anchor that changes nothing, so that an engine can serve it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from adapters.flat import flat_a, flat_b
from adapters.fusion import fuse
from adapters.recipe import FusionMethod
from adapters.training.trainer import StepReport, TrainPlan, train_lora
from bank.building.assemble import BankParts, write_bank
from bank.building.build import read_inputs
from bank.building.options import BuildInputs, BuildOptions
from bank.building.rows import RowProgress, pooled_lessons, row_job, row_seed
from bank.errors import BankError
from bank.items.tasks import get_task
from bank.lookup.index import AnchorIndex
from bank.lookup.weights import common_recipe
from bank.manifest import INDEX_FILE, BankManifest, read_manifest
from bank.matrix import open_matrix
from bank.models.folders import ensure_base_model
from bank.models.load import load_base
from bank.rules import WeightRule

BASELINES = "baselines"
TASK_ROW = "task"


def build_baselines(
    inputs: BuildInputs, options: BuildOptions, manifest: BankManifest, progress: RowProgress
) -> BankManifest:
    """Train the task's row of a finished bank, built from these inputs with these options, unless it is there."""
    out = inputs.out / BASELINES
    with suppress(BankError):  # there is none, or one of an earlier version
        if (found := read_manifest(out)).training.get("of") == manifest.fingerprint:
            return found
    task = get_task(options.task)
    people, _ = read_inputs(inputs, task, options)
    options = options.resolved()
    learnt = pooled_lessons(people, task, options)
    model, tokenizer = load_base(ensure_base_model(inputs.model, inputs.cache_dir), options.dtype)
    steps = options.steps * len(manifest.anchors)
    plan = TrainPlan(steps, options.batch_size, options.learning_rate, row_seed(options.seed, TASK_ROW))
    job = row_job(TASK_ROW, learnt, plan, tokenizer, options.max_tokens)
    progress.say(f"baseline: training the common row for {steps} more steps, as long as all anchors together")
    progress.begin({TASK_ROW: job.work_tokens})

    def on_step(report: StepReport) -> None:
        progress.step(TASK_ROW, steps, report)

    start = fuse(open_matrix(inputs.out, manifest), common_recipe(manifest), torch.float32)
    trained = train_lora(model, job.examples, plan, start=start, on_step=on_step)
    return write_bank(out, _parts(inputs, manifest, trained, steps))


def _parts(inputs: BuildInputs, manifest: BankManifest, trained: Any, steps: int) -> BankParts:
    layout = manifest.layout
    row = flat_b(layout, trained)
    return BankParts(
        task=manifest.task,
        base_model=manifest.base_model,
        embedder=manifest.embedder,
        method=FusionMethod.SHARED,
        common=True,
        user_rank=manifest.user_rank,
        weights=WeightRule(anchors=1),
        layout=layout,
        rows=[torch.zeros_like(row), row],
        shared_a=flat_a(layout, trained),
        embeddings=AnchorIndex.load(inputs.out / INDEX_FILE).vectors([0]),
        items=[0],
        training={"of": manifest.fingerprint, "steps": steps},
    )
