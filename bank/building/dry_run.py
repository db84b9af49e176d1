"""`mta bank check`: what a build would take from people's texts and leave out, and how long it would take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adapters.recipe import anchor_id
from adapters.training.trainer import initial_lora, linear_modules
from bank.building.build import read_inputs
from bank.building.options import BuildInputs, BuildOptions
from bank.building.progress import RowProgress
from bank.building.rows import RowTrainer
from bank.building.selection import MIN_ITEMS, select_anchors
from bank.building.signer import measured_people
from bank.items.folders import LeftOut
from bank.items.histories import History
from bank.items.profile import PLAIN, item_pair, untaught
from bank.items.tasks import get_task
from bank.models.folders import ensure_base_model
from bank.models.load import load_base, resolve_dtype

DRAWN, JUDGED = 2.0, 4.0  # work to measure a token, and one of a person who judges, where training on it is 1
TIMED = 8  # examples of the step that is timed


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a build would read; `seconds` is None if too few people could be anchors."""

    people: int
    held_out: int  # of the people, to measure the bank on
    candidates: int  # people with enough lessons to be anchors
    teachers: int  # people with a lesson
    items: int
    lessons: int
    untaught: str  # why the first item that is no lesson teaches nothing
    left_out: Sequence[LeftOut]
    seconds: float | None


def dry_run(inputs: BuildInputs, options: BuildOptions, say: Callable[[str], None]) -> DryRun:
    """Read the people as a build does, and time one training step; BankError if nobody is left."""
    task, left_out = get_task(options.task), list[LeftOut]()
    people, held_out = read_inputs(inputs, task, options, on_left_out=left_out.append)
    everybody = [*people, *held_out]
    lengths = [len(person.pairs(task)) for person in everybody]
    plain = (i.fields[PLAIN] for each in everybody for i in each.items if PLAIN in i.fields and not item_pair(i, task))
    candidates = [person for person in people if len(person.pairs(task)) >= MIN_ITEMS]
    enough = len(candidates) >= options.anchors
    if enough:
        say("timing a training step")
    return DryRun(
        len(everybody),
        len(held_out),
        len(candidates),
        sum(map(bool, lengths)),
        sum(len(person.items) for person in everybody),
        sum(lengths),
        next((untaught(text, task) for text in plain), ""),
        left_out,
        _seconds(people, candidates, inputs, options) if enough else None,
    )


def _seconds(
    people: Sequence[History], candidates: Sequence[History], inputs: BuildInputs, options: BuildOptions
) -> float:
    """Estimate how long training and measuring take on this machine; embedding and the verdict are short."""
    folder = ensure_base_model(inputs.model, inputs.cache_dir, template=inputs.template)
    model, tokenizer = load_base(folder, resolve_dtype(options.dtype))
    trainer = RowTrainer(model, tokenizer, get_task(options.task), options, RowProgress())
    lengths = [len(person.pairs(trainer.task)) for person in candidates]
    anchors = [candidates[at] for at in select_anchors(None, lengths, options.anchors, options.seed)]
    common = trainer.job("common", people, options.common_steps, options.common_batch_size)
    rows = [
        trainer.job(anchor_id(at), [anchor], options.steps, options.batch_size) for at, anchor in enumerate(anchors)
    ]
    measured = measured_people(people, anchors, trainer)
    tokens = (
        sum(job.work_tokens for job in (common, *rows))
        + DRAWN * sum(person.tokens for person in measured.people)
        + JUDGED * sum(person.tokens for person in measured.judges)
    )
    step = replace(common, examples=common.examples[:TIMED], plan=replace(common.plan, steps=1, batch_size=TIMED))
    start = initial_lora(linear_modules(model, options.target_modules), options.rank, options.seed)
    begun_s = time.perf_counter()
    trainer.train(step, start)
    return (time.perf_counter() - begun_s) * tokens / step.work_tokens
