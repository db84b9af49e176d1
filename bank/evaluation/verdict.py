"""The end of `mta bank build`: what the bank gains for people who were left out of it, and whether history helps.

A few people, a few of their last answers, one pass under each of two adapters, without and with past items in the
prompt. All of it is done by the code that serves: signature, recipe, and the choice of the item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from statistics import fmean, median

import numpy as np

from bank.building.build import EMBED_THREADS, read_inputs
from bank.building.options import BuildInputs, BuildOptions
from bank.building.rows import RowProgress
from bank.building.selection import ASKED
from bank.building.signer import Signer
from bank.evaluation.people import Person, Query, asked
from bank.evaluation.scoring import Scorer
from bank.evaluation.speakers import OpenBank, PersonAdapter
from bank.items.histories import History
from bank.items.profile import item_text, profile_embedding
from bank.items.prompt import encode_pair
from bank.items.tasks import few_and_many, get_task
from bank.lookup.embedder import Embedder
from bank.lookup.prior import personal_shares, surprise
from bank.lookup.signature import MAX_ITEMS
from bank.lookup.weights import common_recipe
from bank.manifest import BankManifest, write_manifest
from bank.models.folders import ensure_base_model, ensure_embedder
from bank.models.load import load_base, resolve_dtype
from bank.rules import Difference, Verdict

COMMON, MERGED, PRIOR = "common", "merged", "prior"
_LEVEL = 0.95
_NO_BOUND = 1e9
"""As good as infinity, which JSON has not."""

Losses = dict[str, float]
"""One person's mean loss by method, nats a token."""


def judge_bank(
    inputs: BuildInputs, options: BuildOptions, manifest: BankManifest, progress: RowProgress
) -> BankManifest:
    """Measure a finished bank and write the verdict into its manifest, unless it is there already.

    Args:
        inputs, options: those of the bank.
        manifest: the bank's.
        progress: told of every person.
    """
    if not options.verdict or manifest.verdict:
        return manifest
    _, aside = read_inputs(inputs, get_task(options.task), options)
    if not aside:
        progress.say("there are too few people to leave any out: what the bank gains is not measured")
        return manifest
    embedder = Embedder.load(ensure_embedder(inputs.embedder, inputs.cache_dir), EMBED_THREADS)
    base = load_base(ensure_base_model(inputs.model, inputs.cache_dir), resolve_dtype(options.dtype))
    judge = _Judge(OpenBank.open(inputs.out, embedder.id), embedder, Scorer(*base), options.max_tokens)
    found = []
    for place, person in enumerate(aside):
        progress.piece("measuring on people left out", place, len(aside))
        found.append(judge.losses(person))
    progress.piece("measuring on people left out", len(aside), len(aside))
    tried = few_and_many(judge.bank.serving.task.kind)
    return write_manifest(inputs.out, manifest.model_copy(update={"verdict": verdict(found, tried)}))


@dataclass(frozen=True, slots=True)
class _Judge:
    """What people are measured with."""

    bank: OpenBank
    embedder: Embedder
    scorer: Scorer
    max_tokens: int

    def losses(self, person: History) -> Losses:
        """The losses of a person's last answers, of which the bank knows only what came before them."""
        task, tokenizer = self.bank.serving.task, self.scorer.tokenizer
        known, pairs = History(person.user_id, person.items[:-ASKED]), person.pairs(task)[-ASKED:]
        adapters = {COMMON: self._common(), MERGED: self._merged(known)}
        judged = Person(known, tuple(Query(str(place), *pair) for place, pair in enumerate(pairs)))
        counts = {"": 0} | {recalling(count): count for count in few_and_many(task.kind)}
        prompts = {name: asked(tokenizer, task, judged, count, self.max_tokens) for name, count in counts.items()}
        found: Losses = {}
        for name, adapter in adapters.items():
            for history, examples in prompts.items():
                found[name + history] = fmean(reading.loss for reading in self.scorer.read(adapter, examples))
        if prior := self.bank.manifest.prior:
            shares = personal_shares(prior, [answer for _, answer in known.pairs(task)])
            tokens = [example.output_tokens for example in prompts[""]]
            surprises = [surprise(shares, answer) / n for (_, answer), n in zip(pairs, tokens, strict=True)]
            found[PRIOR] = fmean(surprises)
        return found

    def _common(self) -> PersonAdapter | None:
        manifest = self.bank.manifest
        return PersonAdapter(self.bank, common_recipe(manifest)) if manifest.common else None

    def _merged(self, known: History) -> PersonAdapter:
        serving, manifest = self.bank.serving, self.bank.manifest
        embedding = profile_embedding(self.embedder.embed([item_text(item, serving.task) for item in known.items]))
        signature = None
        if serving.signs:
            pairs = known.pairs(serving.task)[-MAX_ITEMS:]
            examples = [encode_pair(self.scorer.tokenizer, *pair, self.max_tokens) for pair in pairs]
            signer = Signer(self.scorer.bare(), self.bank.matrix, at_common=manifest.signed)
            signature = signer.signature(manifest.short, examples)
        return PersonAdapter(self.bank, serving.personalise(embedding, signature).recipe)


def verdict(people: Sequence[Losses], tried: tuple[int, int]) -> Verdict:
    """What the losses of some people say of their bank.

    Args:
        people: each one's, all with the same methods.
        tried: numbers of past items; the larger has to be surely better to become the default.
    """

    def less(method: str, other: str) -> Difference:
        return difference([losses[method] - losses[other] for losses in people])

    one, more = tried
    history = one if less(MERGED + recalling(one), MERGED).lower else 0
    if less(MERGED + recalling(more), MERGED + recalling(one)).lower and less(MERGED + recalling(more), MERGED).lower:
        history = more
    recalled = recalling(history or one)
    return Verdict(
        people=len(people),
        losses={name: fmean(losses[name] for losses in people) for name in people[0]},
        merged=less(MERGED, COMMON),
        recalled=less(COMMON + recalled, COMMON),
        both=less(MERGED + recalled, MERGED),
        beyond=less(MERGED + recalled, COMMON + recalled),
        prior=less(MERGED, PRIOR) if PRIOR in people[0] else None,
        history=history,
    )


def recalling(count: int) -> str:
    """What the name of a method ends in that has so many past items in the prompt."""
    return f"+history@h{count}"


def difference(values: Sequence[float]) -> Difference:
    """The typical difference with its exact interval, by signed ranks (Hodges and Lehmann, 1963).

    One person of a few who gains ten times what others do makes Student's interval wide, and the bootstrap's is too
    narrow. Of six values it takes all, to be sure; fewer have no bounds.
    """
    n = len(values)
    pairs = sorted((one + other) / 2 for one, other in combinations_with_replacement(values, 2))
    ways = np.ones(1)  # in how many of the 2ⁿ ways of giving ranks 1 to n a sign the positive ones sum to 0, 1, …
    for rank in range(1, n + 1):
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    outside = int(np.sum(np.cumsum(ways) / 2**n <= (1 - _LEVEL) / 2))
    low, high = (pairs[outside - 1], pairs[-outside]) if outside else (-_NO_BOUND, _NO_BOUND)
    return Difference(mean=median(pairs), low=low, high=high)
