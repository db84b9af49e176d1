"""The last step of `mta bank build`: measure the bank's gain on held-out people, and whether past items help."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from bank.building.build import EMBED_THREADS, read_inputs
from bank.building.options import BuildInputs, BuildOptions
from bank.building.progress import RowProgress
from bank.building.selection import QUERIES
from bank.items.histories import History
from bank.items.tasks import get_task, past_count_range
from bank.lookup.embedder import Embedder
from bank.manifest import BankManifest, LossDifference, Verdict, write_manifest
from bank.models.folders import ensure_base_model, ensure_embedder
from bank.models.load import load_base
from evaluation.methods import Evaluator, Method
from evaluation.run import MethodRun, evaluate_user
from evaluation.scoring import OpenBank, Scorer

COMMON, MERGED, PRIOR = "common", "merged", "prior"
WITH_WORDS = Method(MERGED, words=True).name
Losses = dict[str, float]  # one person's mean loss by method, in nats per token


def judge_bank(
    inputs: BuildInputs, options: BuildOptions, manifest: BankManifest, progress: RowProgress
) -> BankManifest:
    """Measure a finished bank and write the verdict into its manifest, unless it has one."""
    if not options.verdict or manifest.verdict:
        return manifest
    _, held_out = read_inputs(inputs, get_task(options.task), options)
    if not held_out:
        progress.say("there are too few people to hold any out: the bank's gain is not measured")
        return manifest
    embedder = Embedder.load(ensure_embedder(inputs.embedder, inputs.cache_dir), EMBED_THREADS)
    folder = ensure_base_model(inputs.model, inputs.cache_dir, manifest.base_model, inputs.template)
    base = load_base(folder, str(manifest.training["dtype"]))
    bank = OpenBank.open(inputs.out, embedder.id)
    evaluator = Evaluator(bank=bank, scorer=Scorer(*base), embedder=embedder, max_tokens=options.max_tokens)
    what, found = "measuring on held-out people", list[Losses]()
    progress.piece(what, 0, len(held_out))
    for person in held_out:
        found.append(_losses(evaluator, person))
        progress.piece(what, len(found), len(held_out))
    judged = verdict(found, past_count_range(bank.serving.task.kind))
    return write_manifest(inputs.out, manifest.model_copy(update={"verdict": judged}))


def _losses(evaluator: Evaluator, person: History) -> Losses:
    """Return the losses of a person's last answers; only earlier items are their profile."""
    task = evaluator.bank.serving.task
    methods = [Method(name, history) for name in (COMMON, MERGED) for history in (0, *past_count_range(task.kind))]
    methods += [Method(PRIOR)] if evaluator.bank.manifest.prior else []
    methods += [Method(MERGED, words=True)] if evaluator.bank.manifest.phrases else []
    runs = [MethodRun(method) for method in methods]
    found = evaluate_user(evaluator, person.with_queries(task, QUERIES), runs)
    return {records[0].method: fmean(record.loss for record in records) for records in found}


def verdict(people: Sequence[Losses], tried: tuple[int, int]) -> Verdict:
    """Judge a bank by people's losses; of the two numbers of past items `tried`, the larger must be clearly better."""

    def less(method: str, other: str) -> LossDifference:
        return LossDifference.of([losses[method] - losses[other] for losses in people])

    few, many = tried
    with_few, with_many = (Method(MERGED, count).name for count in tried)
    history = few if less(with_few, MERGED).is_lower else 0
    if less(with_many, with_few).is_lower and less(with_many, MERGED).is_lower:
        history = many
    common, merged = (Method(name, history or few).name for name in (COMMON, MERGED))
    return Verdict(
        people=len(people),
        losses={name: fmean(losses[name] for losses in people) for name in people[0]},
        merged=less(MERGED, COMMON),
        recalled=less(common, COMMON),
        both=less(merged, MERGED),
        beyond=less(merged, common),
        prior=less(MERGED, PRIOR) if PRIOR in people[0] else None,
        words=less(WITH_WORDS, MERGED) if WITH_WORDS in people[0] else None,
        history=history,
    )
