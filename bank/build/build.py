"""`mta bank build`: from people's histories to a bank.

Read, embed, choose anchors, train the common row and one meta-LoRA per anchor, write. Every finished piece is kept in
the work folder (`bank/build/resume.py`); each depends on the inputs and its own seed alone, so a build that was killed
and started again ends with the fingerprint it would have had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from adapters.recipe import FusionMethod, anchor_id
from bank.build.assemble import BankParts, bank_rank, write_bank
from bank.build.options import BuildInputs, BuildOptions, inputs_key
from bank.build.resume import workbench
from bank.build.selection import MIN_ITEMS, person_embedding, select_anchors
from bank.errors import BankError
from bank.items.histories import History, read_excluded, read_histories
from bank.items.profile import Vectors
from bank.items.tasks import Task, get_task
from bank.lookup.embedder import Embedder
from bank.lookup.signature import MAX_ANCHORS
from bank.manifest import (
    MANIFEST_FILE,
    BankManifest,
    BaseModelId,
    EmbedderId,
    read_manifest,
    verify_files,
)
from bank.models.folders import ensure_base_model, ensure_embedder, model_hash, model_name

if TYPE_CHECKING:
    from bank.build.rows import RowProgress

EMBED_THREADS = 2


def build_bank(inputs: BuildInputs, options: BuildOptions, progress: RowProgress) -> BankManifest:
    """Build a bank, or go on with one that was begun.

    Returns:
        The manifest; the one that is there when the folder holds this very bank already.

    Raises:
        BankError: when inputs, options or the folder do not allow it.
    """
    from bank.build.calibration import MIN_PEOPLE, calibrate_signer
    from bank.build.rows import train_rows
    from bank.build.signer import Signer
    from bank.build.training import load_base, resolve_dtype

    task = get_task(options.task)
    signs = _signs(options)
    # Refuse before training, not after.
    bank_rank(options.method, options.rank, options.rule(), options.common, options.user_rank)
    people = read_inputs(inputs, task)
    candidates = [person for person in people if len(person.pairs(task)) >= MIN_ITEMS]
    progress.say(f"{len(people)} people, {len(candidates)} of them with at least {MIN_ITEMS} items to train on")
    if len(candidates) < options.anchors:
        raise BankError(
            f"{options.anchors} anchors were asked for and {len(candidates)} people have at least {MIN_ITEMS} items "
            "to train on: ask for fewer with --anchors, or give more people"
        )
    progress.say(f"base model {inputs.model}, embedder {inputs.embedder or 'default'}")
    model_folder = ensure_base_model(inputs.model, inputs.cache_dir)
    embedder = Embedder.load(ensure_embedder(inputs.embedder, inputs.cache_dir), EMBED_THREADS)
    options = dataclasses.replace(options, dtype=resolve_dtype(options.dtype))
    base = BaseModelId(name=model_name(inputs.model, model_folder), hash=model_hash(model_folder))
    key = inputs_key(options, task, people, base.hash, embedder.id)
    if (built := _finished(inputs, key)) is not None:
        progress.say(f"{inputs.out} holds this very bank already")
        return built
    with workbench(inputs.out, key) as work:
        embeddings = work.vectors("embeddings", lambda: _embed(candidates, task, embedder, progress))
        lengths = [len(person.pairs(task)) for person in candidates]
        chosen = select_anchors(embeddings, lengths, options.anchors, options.seed)
        progress.say("anchors: " + ", ".join(f"{anchor_id(i)} ({lengths[at]} items)" for i, at in enumerate(chosen)))
        progress.say(f"loading the base model ({options.dtype})")
        model, tokenizer = load_base(model_folder, options.dtype)
        trained = train_rows(
            work,
            model=model,
            tokenizer=tokenizer,
            people=people,
            anchors=[candidates[at] for at in chosen],
            task=task,
            options=options,
            progress=progress,
        )
        rest = [person for at, person in enumerate(candidates) if at not in chosen]
        training, calibration = options.record(key, len(people)), None
        if signs and (len(rest) >= MIN_PEOPLE or options.weights == "signature"):
            progress.say(f"calibrating signatures on {len(rest)} people who are not anchors")
            calibration = calibrate_signer(
                Signer(model, trained.matrix(len(chosen))),
                rest,
                task,
                tokenizer,
                work,
                max_tokens=options.max_tokens,
                seed=options.seed,
                on_draw=lambda done, of: progress.piece("calibrating", done, of),
            )
            training |= calibration.record()
        parts = BankParts(
            task=task.name,
            base_model=base,
            embedder=EmbedderId(id=embedder.id, dim=embedder.dim),
            method=options.method,
            common=options.common,
            user_rank=options.user_rank,
            weights=options.rule(calibration),
            layout=trained.layout,
            rows=trained.rows,
            shared_a=trained.shared_a,
            embeddings=embeddings[chosen],
            items=[lengths[at] for at in chosen],
            training=training,
        )
        return write_bank(inputs.out, parts)


def _signs(options: BuildOptions) -> bool:
    """Whether the bank shall have signatures, if there are people to calibrate them on.

    Raises:
        BankError: when they are asked for and cannot be.
    """
    if options.weights == "signature" and options.method is not FusionMethod.SHARED:
        raise BankError(f"signatures need --method shared, got {options.method.value}: its anchors have no A in common")
    return options.weights != "topic" and options.method is FusionMethod.SHARED and options.anchors <= MAX_ANCHORS


def read_inputs(inputs: BuildInputs, task: Task) -> list[History]:
    """Everybody who may enter a bank.

    Raises:
        BankError: when the files cannot be read, or leave nobody.
    """
    people = read_histories(inputs.users, task, inputs.outputs)
    excluded = read_excluded(inputs.exclude) if inputs.exclude is not None else frozenset()
    kept = [person for person in people if person.user_id not in excluded]
    if not kept:
        raise BankError(f"{inputs.exclude} leaves out everybody in {inputs.users}")
    return kept


def _finished(inputs: BuildInputs, key: str) -> BankManifest | None:
    """The bank in the output folder when it is the one that these inputs make, None when there is none to keep.

    Raises:
        BankError: when there is another one and `force` is not set.
    """
    if not (inputs.out / MANIFEST_FILE).exists():
        return None
    try:
        manifest = read_manifest(inputs.out)
        if manifest.training.get("inputs") == key:
            verify_files(inputs.out, manifest)
            return manifest
        found = f"another bank, {manifest.short}"
    except BankError as error:
        found = f"a bank that cannot be used ({error})"
    if inputs.force:
        return None
    raise BankError(f"{inputs.out} holds {found}: name another --out, or replace it with --force")


def _embed(people: Sequence[History], task: Task, embedder: Embedder, progress: RowProgress) -> Vectors:
    progress.say(f"embedding the histories of {len(people)} people")
    return np.stack([person_embedding(person, task, embedder) for person in people])
