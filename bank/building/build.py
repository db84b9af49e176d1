"""`mta bank build`: from people's histories to a bank.

Read, embed, choose anchors, train the common row and one meta-LoRA per anchor, write. Every finished piece is kept in
the work folder (`bank/building/resume.py`); each depends on the inputs and its own seed alone, so a build that was
killed and started again ends with the fingerprint it would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapters.recipe import FusionMethod, anchor_id
from bank.building.assemble import BankParts, bank_rank, write_bank
from bank.building.describing import typical_words
from bank.building.options import BuildInputs, BuildOptions
from bank.building.resume import Workbench, finished_bank, inputs_key, workbench
from bank.building.rows import RowProgress, TrainedRows, train_rows
from bank.building.selection import MIN_ITEMS, left_out, person_embedding, sampled_embedding, select_anchors
from bank.building.signer import Signer, measure_curvature
from bank.errors import BankError
from bank.items.histories import History, read_excluded, read_histories
from bank.items.profile import Vectors
from bank.items.tasks import Task, get_task
from bank.lookup.embedder import Embedder
from bank.lookup.prior import fit_prior
from bank.lookup.signature import Curvature
from bank.manifest import BankManifest, BaseModelId, EmbedderId
from bank.models.folders import ensure_base_model, ensure_embedder, model_hash, model_name, prompts_hash
from bank.models.load import load_base

EMBED_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Job:
    """A build that is ready to begin: everything is read and checked.

    Attributes:
        people: whose items train the common row.
        candidates: those of them who may become anchors.
        key: hash of all that shapes the bank.
    """

    options: BuildOptions
    task: Task
    people: list[History]
    candidates: list[History]
    model_folder: Path
    base: BaseModelId
    embedder: Embedder
    key: str


def build_bank(inputs: BuildInputs, options: BuildOptions, progress: RowProgress) -> BankManifest:
    """Build a bank, or continue one that was begun, or find that the folder holds this very bank already.

    Raises:
        BankError: when inputs, options or the folder do not allow it.
    """
    job = _prepare(inputs, options, progress)
    if (built := finished_bank(inputs.out, job.key, force=inputs.force)) is not None:
        progress.say(f"{inputs.out} holds this very bank already")
        return built
    with workbench(inputs.out, job.key) as work:
        build = _Build(job, work, progress)
        anchors, embeddings = build.select()
        trained = build.train(anchors)
        return write_bank(inputs.out, build.assemble(anchors, embeddings, trained, build.measure(trained)))


def _prepare(inputs: BuildInputs, options: BuildOptions, progress: RowProgress) -> _Job:
    """Read the inputs, and refuse before training whatever would be refused after it."""
    task, options = get_task(options.task), options.resolved()
    bank_rank(FusionMethod.SHARED, options.rank, options.rule(), True, options.user_rank)
    people, aside = read_inputs(inputs, task, options)
    if aside:
        progress.say(f"{len(aside)} people are left out, to measure the bank on them")
    candidates = [person for person in people if len(person.pairs(task)) >= MIN_ITEMS]
    progress.say(f"{len(people)} people, {len(candidates)} of them with at least {MIN_ITEMS} items to train on")
    if len(candidates) < options.anchors:
        raise BankError(
            f"{options.anchors} anchors were asked for, but only {len(candidates)} people have at least {MIN_ITEMS} "
            "items to train on: ask for fewer with --anchors, or give more people"
        )
    progress.say(f"base model {inputs.model}, embedder {inputs.embedder or 'default'}")
    model_folder = ensure_base_model(inputs.model, inputs.cache_dir)
    embedder = Embedder.load(ensure_embedder(inputs.embedder, inputs.cache_dir), EMBED_THREADS)
    base = BaseModelId(name=model_name(inputs.model, model_folder), hash=model_hash(model_folder))
    key = inputs_key(options, task, people, aside, (base.hash, prompts_hash(model_folder), embedder.id))
    return _Job(options, task, people, candidates, model_folder, base, embedder, key)


class _Build:
    """A build under way: its four steps, each of which keeps what it finishes."""

    def __init__(self, job: _Job, work: Workbench, progress: RowProgress) -> None:
        self._job = job
        self._work = work
        self._progress = progress

    def select(self) -> tuple[list[History], Vectors]:
        """Choose the anchors among the candidates, and embed each as a user's profile is embedded, [N, E]."""
        job = self._job
        lengths = [len(person.pairs(job.task)) for person in job.candidates]
        longest = job.options.anchors_by == "longest"
        sampled = None if longest else self._work.vectors("embeddings", self._sampled)
        chosen = select_anchors(sampled, lengths, job.options.anchors, job.options.seed)
        self._progress.say(
            "anchors: " + ", ".join(f"{anchor_id(i)} ({lengths[at]} items)" for i, at in enumerate(chosen))
        )
        anchors = [job.candidates[at] for at in chosen]

        def embed() -> Vectors:
            return np.stack([person_embedding(person, job.task, job.embedder) for person in anchors])

        return anchors, self._work.vectors("anchors", embed)

    def train(self, anchors: list[History]) -> TrainedRows:
        """Train the common row and the anchors' rows."""
        model, tokenizer = self._base
        return train_rows(
            self._work,
            model=model,
            tokenizer=tokenizer,
            people=self._job.people,
            anchors=anchors,
            task=self._job.task,
            options=self._job.options,
            progress=self._progress,
        )

    def measure(self, trained: TrainedRows) -> Vectors | None:
        """The curvature [N, N]; None for a bank of so many anchors that it has no signatures."""
        job, matrix = self._job, trained.matrix()
        if job.options.rule().posterior is None:
            return None
        self._progress.say("measuring how the loss bends along the anchors' rows")
        model, tokenizer = self._base
        measured = measure_curvature(
            Signer(model, matrix),
            job.people,
            job.task,
            tokenizer,
            self._work,
            anchors=matrix.anchors,
            max_tokens=job.options.max_tokens,
            seed=job.options.seed,
            on_anchor=lambda done, of: self._progress.piece("measuring", done, of),
        )
        Curvature.of(measured)  # what nobody could be served with is said now
        return measured

    def assemble(
        self, anchors: list[History], embeddings: Vectors, trained: TrainedRows, curvature: Vectors | None
    ) -> BankParts:
        """All that the bank is put together from."""
        job = self._job
        return BankParts(
            task=job.task.name,
            base_model=job.base,
            embedder=EmbedderId(id=job.embedder.id, dim=job.embedder.dim),
            method=FusionMethod.SHARED,
            common=True,
            user_rank=job.options.user_rank,
            weights=job.options.rule(),
            layout=trained.layout,
            rows=trained.rows,
            shared_a=trained.shared_a,
            embeddings=embeddings,
            items=[len(person.pairs(job.task)) for person in anchors],
            training=job.options.record(job.key, len(job.people)),
            prior=fit_prior(job.task, [[gold for _, gold in person.pairs(job.task)] for person in job.people]),
            curvature=curvature,
            words=typical_words(anchors, job.task) if job.options.describe else (),
        )

    @cached_property
    def _base(self) -> tuple[Any, Any]:
        self._progress.say(f"loading the base model ({self._job.options.dtype})")
        return load_base(self._job.model_folder, self._job.options.dtype)

    def _sampled(self) -> Vectors:
        candidates = self._job.candidates
        self._progress.say(f"embedding the histories of {len(candidates)} people")
        return np.stack([sampled_embedding(person, self._job.task, self._job.embedder) for person in candidates])


def read_inputs(inputs: BuildInputs, task: Task, options: BuildOptions) -> tuple[list[History], list[History]]:
    """Everybody who enters a bank, and who is left out of it to measure it on.

    Raises:
        BankError: when the files cannot be read, or leave nobody.
    """
    people = read_histories(inputs.users, task, inputs.outputs)
    excluded = read_excluded(inputs.exclude) if inputs.exclude is not None else frozenset()
    kept = [person for person in people if person.user_id not in excluded]
    if not kept:
        raise BankError(f"{inputs.exclude} leaves out everybody in {inputs.users}")
    aside = left_out(kept, task, options.anchors) if options.verdict else []
    return [person for person in kept if person not in aside], aside
