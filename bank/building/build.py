"""`mta bank build`: build a bank from people's histories; a restarted build gives the same fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from adapters.flat import flattened
from adapters.fusion import fuse
from adapters.recipe import MAX_DIRECTIONS, MAX_TERMS, FusionMethod, anchor_id
from bank.building.assemble import BASELINES, bank_rank, write_bank
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
from bank.building.signer import MeasuredPerson, Signer, fit_rule, judges_of, measure_curvature, measured_people
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
from bank.manifest import INDEX_FILE, BankManifest, EmbedderId, PhraseRule, WeightRule, read_manifest
from bank.matrix import open_matrix
from bank.models.folders import base_model_id, ensure_base_model, ensure_embedder
from bank.models.load import load_base

EMBED_THREADS = 2
EMBEDDED_AT_ONCE = 16  # people whose embeddings are one piece of work
KEPT = 0.95  # share of the gain that chosen directions keep


def build_bank(
    inputs: BuildInputs, options: BuildOptions, progress: RowProgress, ranks: Ranks | None = None
) -> BankManifest:
    """Build a bank, continue an interrupted build, or return the finished one; BankError before training if invalid."""
    ranks = ranks or Ranks()
    task = get_task(options.task)
    bank_rank(FusionMethod.SHARED, options.rank, options.rule(), True, options.user_rank)
    if (options.directions or 0) > options.anchors:
        raise BankError(f"--directions: at most --anchors {options.anchors}, got {options.directions}")
    if not options.wants_directions and options.anchors > MAX_TERMS:
        raise BankError(f"--directions 0: a recipe names at most {MAX_TERMS} anchors, got --anchors {options.anchors}")
    left_out = list[LeftOut]()
    people, held_out = read_inputs(inputs, task, options, progress.say, left_out.append)
    if left_out:
        first = f"{left_out[0].where} {left_out[0].why}"
        progress.say(f"{len(left_out)} files, mails or lines are left out ({first}): `mta bank check` counts them")
    candidates = [person for person in people if len(person.pairs(task)) >= MIN_ITEMS]
    progress.say(f"{len(people)} people, {len(candidates)} of them with at least {MIN_ITEMS} items to train on")
    if len(candidates) < options.anchors:
        raise BankError(
            f"{options.anchors} anchors were asked for, but only {len(candidates)} people have at least {MIN_ITEMS} "
            "items to train on: ask for fewer with --anchors, or give more people"
        )
    progress.say(f"base model {inputs.model}, embedder {inputs.embedder or 'default'}")
    model_folder = ensure_base_model(inputs.model, inputs.cache_dir, template=inputs.template)
    embedder = Embedder.load(ensure_embedder(inputs.embedder, inputs.cache_dir), EMBED_THREADS)
    base = base_model_id(inputs.model, model_folder)
    asked = build_inputs(options, task, people, held_out, (base.hash, *base.prompts.values(), embedder.id))
    if (built := ranks.first(lambda: finished_bank(inputs.out, asked, force=inputs.force))) is not None:
        progress.say(f"{inputs.out} already holds this bank")
        return built
    with workbench(inputs.out, asked, ranks, force=inputs.force) as (work, begun):
        options = replace(options, dtype=begun["dtype"])
        lengths = [len(person.pairs(task)) for person in candidates]
        sampled = None
        if options.anchors_by == "topics":
            progress.say(f"embedding the histories of {len(candidates)} people")
            sampled = _embeddings(
                "candidates", candidates, lambda one: mean_embedding(spread(one.items), task, embedder), work
            )
        chosen = select_anchors(sampled, lengths, options.anchors, options.seed)
        progress.say("anchors: " + ", ".join(f"{anchor_id(i)} ({lengths[at]} items)" for i, at in enumerate(chosen)))
        anchors = [candidates[at] for at in chosen]
        embeddings = _embeddings("anchors", anchors, lambda one: person_embedding(one, task, embedder), work)
        progress.say(f"loading the base model ({options.dtype})")
        model, tokenizer = load_base(model_folder, options.dtype)
        trainer = RowTrainer(model, tokenizer, task, options, progress)
        measured, judges = measured_people(people, anchors, trainer)
        few = "too few people to leave any out: the decay is chosen on some in the common row, and may be too high"
        progress.say(f"the common row does not see {judges} people, on whom the decay is chosen" if judges else few)
        unseen = {person.user_id for person in measured[:judges]}
        matrix = trainer.rows(work, [person for person in people if person.user_id not in unseen], anchors)
        progress.say("measuring the curvature of the loss along the anchors' rows")
        signer = Signer(model, matrix, options.acts)
        rule, curvature, directions, phrases = _measured(signer, measured, judges, trainer, work)
        words = likelier_words(signer, len(anchors), trainer, work)
        return ranks.first(
            lambda: write_bank(
                inputs.out,
                task=task.name,
                base_model=base,
                embedder=EmbedderId(id=embedder.id, dim=embedder.dim),
                common=True,
                user_rank=options.user_rank,
                weights=rule,
                layout=matrix.layout,
                rows=list(matrix.rows),
                shared_a=matrix.shared_a,
                embeddings=embeddings,
                items=[lengths[at] for at in chosen],
                training={**begun, **made_by(inputs.users), "people": len(people), "unseen_judges": judges},
                prior=fit_prior(task, [[gold for _, gold in person.pairs(task)] for person in people]),
                curvature=curvature,
                words=words,
                directions=directions,
                phrases=phrases,
                record=partial(record_canary, model, tokenizer),
            )
        )


def _embeddings(name: str, people: Sequence[History], embed: Callable[[History], Vectors], work: Workbench) -> Vectors:
    """Return the embedding of each person, [P, E]; each piece of work has a few people."""
    parts = [people[first : first + EMBEDDED_AT_ONCE] for first in range(0, len(people), EMBEDDED_AT_ONCE)]
    names = [f"{name}-{place:04d}" for place in range(len(parts))]
    return np.concatenate(work.pieces(names, lambda place: np.stack([embed(person) for person in parts[place]])))


def _measured(
    signer: Signer, measured: Sequence[MeasuredPerson], judges: int, trainer: RowTrainer, work: Workbench
) -> tuple[WeightRule, Vectors, DirectionRows | None, PhraseRule | None]:
    """Return the bank's rule, the curvature along the anchors' rows, the directions if it has them, and the trust."""
    options, say = trainer.options, trainer.progress.say
    curvature = measure_curvature(signer, measured, trainer, work)
    known = Curvature.of(curvature)  # raises BankError now if the bank could not serve with this curvature
    judging = measured[:judges] or measured
    decay, kept = fit_rule(signer, known, judging, trainer, work)
    rule = options.rule(decay)
    phrases = fit_phrases(signer, known, judges_of(known, judging), trainer, work, decay=decay)
    if not options.wants_directions:
        return rule, curvature, None, phrases
    count = min(options.directions or int(np.argmax(kept >= KEPT)) + 1, MAX_DIRECTIONS)
    told = ", ".join(
        f"{kept[k - 1]:.0%} of the gain with {k}" for k in (8, 16, 32, 64, 128, 256, 384) if k <= len(kept)
    )
    say(f"the rows are {count} directions of {len(kept)} anchors and keep {kept[count - 1]:.0%} of the gain; {told}")
    deviation = float(known.eigenvalues.mean() * decay) ** -0.5
    directions = make_directions(known, count, deviation)
    return rule.model_copy(update={"posterior": directions.rule}), curvature, directions, phrases


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
        if (found := read_manifest(out)).training.get("of") == manifest.fingerprint:
            return found
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
        task=manifest.task,
        base_model=manifest.base_model,
        embedder=manifest.embedder,
        common=True,
        user_rank=manifest.user_rank,
        weights=WeightRule(anchors=1),
        layout=manifest.layout,
        rows=[torch.zeros_like(row), row],
        shared_a=flattened(manifest.layout, trained.a),
        embeddings=AnchorIndex.load(inputs.out / INDEX_FILE).vectors([0]),
        items=[0],
        training={"of": manifest.fingerprint, "steps": steps},
    )
