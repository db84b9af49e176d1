"""`mta bank build`: build a bank from people's histories; a restarted build gives the same fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from adapters.flat import flattened
from adapters.fusion import fuse
from adapters.recipe import MAX_DIRECTIONS, MAX_TERMS, FusionMethod, anchor_id
from bank.building.assemble import BASELINES, Anchors, BankRows, Basis, Rules, bank_rank, write_bank
from bank.building.directions import DirectionRows, make_directions
from bank.building.drafting import made_by
from bank.building.options import BuildInputs, BuildOptions
from bank.building.phrases import fit_phrases
from bank.building.progress import RowProgress
from bank.building.ranks import Ranks
from bank.building.readings import record_canary
from bank.building.resume import Workbench, build_inputs, finished_bank, workbench
from bank.building.rows import RowTrainer
from bank.building.selection import (
    MIN_ITEMS,
    held_out_people,
    mean_embedding,
    person_embedding,
    select_anchors,
    spread,
)
from bank.building.signer import MeasuredPeople, Signer, fit_rule, judges_of, measure_curvature, measured_people
from bank.building.words import likelier_words
from bank.errors import BankError
from bank.items.folders import LeftOut
from bank.items.histories import History, read_excluded, read_histories
from bank.items.profile import Vectors
from bank.items.tasks import Task, get_task
from bank.lookup.embedder import Embedder
from bank.lookup.index import AnchorIndex
from bank.lookup.prior import fit_prior
from bank.lookup.signature import Curvature
from bank.manifest import INDEX_FILE, BankManifest, BaseModelId, EmbedderId, WeightRule, read_manifest
from bank.matrix import open_matrix
from bank.models.folders import base_model_id, ensure_base_model, ensure_embedder
from bank.models.load import load_base

EMBED_THREADS = 2
EMBEDDED_AT_ONCE = 16  # people whose embeddings are one piece of work
KEPT = 0.95  # share of the gain that chosen directions keep


@dataclass(frozen=True, slots=True)
class Models:
    """What a bank is built on."""

    folder: Path  # of the base model
    base: BaseModelId
    embedder: Embedder

    @property
    def hashes(self) -> Sequence[str]:
        return self.base.hash, *self.base.prompts.values(), self.embedder.id


def build_bank(
    inputs: BuildInputs, options: BuildOptions, progress: RowProgress, ranks: Ranks | None = None
) -> BankManifest:
    """Build a bank, continue an interrupted build, or return the finished one; BankError before training if invalid."""
    ranks, task = ranks or Ranks(), get_task(options.task)
    _check_options(options)
    people, held_out = _read_people(inputs, task, options, progress.say)
    candidates = _candidates(people, task, options.anchors, progress.say)
    models = _find_models(inputs, progress.say)
    asked = build_inputs(options, task, people, held_out, models.hashes)
    if (built := ranks.first(lambda: finished_bank(inputs.out, asked, force=inputs.force))) is not None:
        progress.say(f"{inputs.out} already holds this bank")
        return built
    with workbench(inputs.out, asked, ranks, force=inputs.force) as (work, begun):
        options = replace(options, dtype=begun["dtype"])
        chosen, anchors = _choose_anchors(candidates, models.embedder, options, progress.say, work)
        progress.say(f"loading the base model ({options.dtype})")
        model, tokenizer = load_base(models.folder, options.dtype)
        trainer = RowTrainer(model, tokenizer, task, options, progress)
        measured = measured_people(people, chosen, trainer)
        matrix = trainer.rows(work, _seen_by_common_row(people, measured, progress.say), chosen)
        signer = Signer(model, matrix, options.acts)
        rules, directions = _measure(signer, measured, trainer, work)
        words = likelier_words(signer, len(chosen), trainer, work)
        answers = [[gold for _, gold in person.pairs(task)] for person in people]
        embedder = EmbedderId(id=models.embedder.id, dim=models.embedder.dim)
        return ranks.first(
            lambda: write_bank(
                inputs.out,
                Basis(task.name, models.base, embedder, options.user_rank),
                BankRows(matrix.layout, list(matrix.rows), matrix.shared_a, directions=directions),
                replace(anchors, words=words),
                replace(rules, prior=fit_prior(task, answers)),
                training={
                    **begun,
                    **made_by(inputs.users),
                    "people": len(people),
                    "unseen_judges": len(measured.unseen),
                },
                record=partial(record_canary, model, tokenizer),
            )
        )


def _check_options(options: BuildOptions) -> None:
    bank_rank(FusionMethod.SHARED, options.rank, options.rule(), True, options.user_rank)
    if (options.directions or 0) > options.anchors:
        raise BankError(f"--directions: at most --anchors {options.anchors}, got {options.directions}")
    if not options.wants_directions and options.anchors > MAX_TERMS:
        raise BankError(f"--directions 0: a recipe names at most {MAX_TERMS} anchors, got --anchors {options.anchors}")


def _read_people(
    inputs: BuildInputs, task: Task, options: BuildOptions, say: Callable[[str], None]
) -> tuple[list[History], list[History]]:
    """Do as `read_inputs`, and say what is left out."""
    left_out = list[LeftOut]()
    people, held_out = read_inputs(inputs, task, options, say, left_out.append)
    if left_out:
        first = f"{left_out[0].where} {left_out[0].why}"
        say(f"{len(left_out)} files, mails or lines are left out ({first}): `mta bank check` counts them")
    return people, held_out


def _candidates(people: Sequence[History], task: Task, wanted: int, say: Callable[[str], None]) -> list[History]:
    """Return the people who have enough items to be anchors; BankError if they are fewer than `wanted`."""
    candidates = [person for person in people if len(person.pairs(task)) >= MIN_ITEMS]
    say(f"{len(people)} people, {len(candidates)} of them with at least {MIN_ITEMS} items to train on")
    if len(candidates) < wanted:
        raise BankError(
            f"{wanted} anchors were asked for, but only {len(candidates)} people have at least {MIN_ITEMS} "
            "items to train on: ask for fewer with --anchors, or give more people"
        )
    return candidates


def _find_models(inputs: BuildInputs, say: Callable[[str], None]) -> Models:
    say(f"base model {inputs.model}, embedder {inputs.embedder or 'default'}")
    folder = ensure_base_model(inputs.model, inputs.cache_dir, template=inputs.template)
    embedder = Embedder.load(ensure_embedder(inputs.embedder, inputs.cache_dir), EMBED_THREADS)
    return Models(folder, base_model_id(inputs.model, folder), embedder)


def _choose_anchors(
    candidates: Sequence[History],
    embedder: Embedder,
    options: BuildOptions,
    say: Callable[[str], None],
    work: Workbench,
) -> tuple[list[History], Anchors]:
    task, sampled = get_task(options.task), None
    lengths = [len(person.pairs(task)) for person in candidates]
    if options.anchors_by == "topics":
        say(f"embedding the histories of {len(candidates)} people")
        sampled = _embeddings(
            "candidates", candidates, lambda one: mean_embedding(spread(one.items), task, embedder), work
        )
    chosen = select_anchors(sampled, lengths, options.anchors, options.seed)
    say("anchors: " + ", ".join(f"{anchor_id(i)} ({lengths[at]} items)" for i, at in enumerate(chosen)))
    people = [candidates[at] for at in chosen]
    embeddings = _embeddings("anchors", people, lambda one: person_embedding(one, task, embedder), work)
    return people, Anchors(embeddings, [lengths[at] for at in chosen])


def _embeddings(name: str, people: Sequence[History], embed: Callable[[History], Vectors], work: Workbench) -> Vectors:
    """Return the embedding of each person, [P, E]; each piece of work has a few people."""
    parts = [people[first : first + EMBEDDED_AT_ONCE] for first in range(0, len(people), EMBEDDED_AT_ONCE)]
    names = [f"{name}-{position:04d}" for position in range(len(parts))]
    return np.concatenate(work.pieces(names, lambda position: np.stack([embed(person) for person in parts[position]])))


def _seen_by_common_row(
    people: Sequence[History], measured: MeasuredPeople, say: Callable[[str], None]
) -> list[History]:
    unseen = {person.user_id for person in measured.unseen}
    few = "too few people to leave any out: the decay is chosen on some in the common row, and may be too high"
    say(f"the common row does not see {len(unseen)} people, on whom the decay is chosen" if unseen else few)
    return [person for person in people if person.user_id not in unseen]


def _measure(
    signer: Signer, measured: MeasuredPeople, trainer: RowTrainer, work: Workbench
) -> tuple[Rules, DirectionRows | None]:
    """Measure the loss around the common row: return what follows for users, and the directions if the bank has them.

    The curvature is that along the anchors' rows.
    """
    options, say = trainer.options, trainer.progress.say
    say("measuring the curvature of the loss along the anchors' rows")
    curvature = measure_curvature(signer, measured.people, trainer, work)
    known = Curvature.of(curvature)  # raises BankError now if the bank could not serve with this curvature
    decay, kept = fit_rule(signer, known, measured.judges, trainer, work)
    weights = options.rule(decay)
    phrases = fit_phrases(signer, known, judges_of(known, measured.judges), trainer, work, decay=decay)
    directions = None
    if options.wants_directions:
        directions = _directions(known, decay, kept, options.directions, say)
        weights = weights.model_copy(update={"posterior": directions.rule})
    return Rules(weights, curvature, phrases=phrases), directions


def _directions(
    known: Curvature, decay: float, kept: Vectors, wanted: int | None, say: Callable[[str], None]
) -> DirectionRows:
    """Make the `wanted` directions, or those that keep most of the gain; `kept` is its share by their number, [N]."""
    count = min(wanted or int(np.argmax(kept >= KEPT)) + 1, MAX_DIRECTIONS)
    told = ", ".join(
        f"{kept[k - 1]:.0%} of the gain with {k}" for k in (8, 16, 32, 64, 128, 256, 384) if k <= len(kept)
    )
    say(f"the rows are {count} directions of {len(kept)} anchors and keep {kept[count - 1]:.0%} of the gain; {told}")
    return make_directions(known, count, deviation=float(known.eigenvalues.mean() * decay) ** -0.5)


def read_inputs(
    inputs: BuildInputs,
    task: Task,
    options: BuildOptions,
    say: Callable[[str], None] = lambda text: None,
    on_left_out: Callable[[LeftOut], None] = lambda left_out: None,
) -> tuple[list[History], list[History]]:
    """Read the people; return those the bank is built from, and those held out to measure it on."""
    people = read_histories(inputs.users, task, inputs.outputs, on_left_out=on_left_out)
    excluded = read_excluded(inputs.exclude) if inputs.exclude is not None else frozenset()
    kept = [person for person in people if person.user_id not in excluded]
    if not kept:
        raise BankError(f"{inputs.exclude} excludes everybody in {inputs.users}")
    if inputs.exclude is not None:
        say(f"{len(people) - len(kept)} people are excluded by {inputs.exclude}")
    held_out = held_out_people(kept, task, options.anchors) if options.verdict else []
    if held_out:
        say(f"{len(held_out)} people are held out to measure the bank on them")
    return [person for person in kept if person not in held_out], held_out


def build_baselines(
    inputs: BuildInputs, options: BuildOptions, manifest: BankManifest, progress: RowProgress
) -> BankManifest:
    """Train the task row of a finished bank, built from these inputs with these options, unless it exists.

    It is the common row, trained for as many more steps as all anchors, and shows what of their effect is not personal.
    It is stored as a bank with one anchor of zeros, so that an engine can serve it.
    """
    out = inputs.out / BASELINES
    with suppress(BankError):  # no task row yet, or one in an older format
        if (former := read_manifest(out)).training.get("of") == manifest.fingerprint:
            return former
    task = get_task(options.task)
    people, _ = read_inputs(inputs, task, options)
    folder = ensure_base_model(inputs.model, inputs.cache_dir, manifest.base_model, inputs.template)
    model, tokenizer = load_base(folder, str(manifest.training["dtype"]))
    steps = options.steps * len(manifest.anchors)
    trainer = RowTrainer(model, tokenizer, task, options, progress)
    job = trainer.job("task", people, steps, options.batch_size)
    progress.say(f"baseline: training the common row for {steps} more steps, as long as all anchors together")
    progress.begin({job.name: job.work_tokens})
    trained = trainer.train(job, fuse(open_matrix(inputs.out, manifest), manifest.common_recipe, torch.float32))
    row = flattened(manifest.layout, trained.b)
    return write_bank(
        out,
        Basis.of(manifest),
        BankRows(manifest.layout, [torch.zeros_like(row), row], flattened(manifest.layout, trained.a)),
        Anchors(AnchorIndex.load(inputs.out / INDEX_FILE).vectors([0]), [0]),
        Rules(WeightRule(anchors=1)),
        training={"of": manifest.fingerprint, "steps": steps},
    )
