"""The adapter that a method puts on the model for one person, made by the code that serves; and the baselines."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from adapters.lora import LoraWeights
from adapters.recipe import FusionRecipe
from adapters.training.adapt_config import AdaptConfig
from adapters.training.example import Example, output_tokens
from adapters.training.user_trainer import Judgement, train_user
from adapters.user_adapter import encode_user_adapter
from bank.building.signer import Signer
from bank.errors import BankError
from bank.evaluation.methods import Base, EvalMethod
from bank.evaluation.people import Person
from bank.evaluation.scoring import Reading, Scorer
from bank.evaluation.speakers import OpenBank, PersonAdapter
from bank.items.lessons import lessons
from bank.items.profile import Vectors, item_text, profile_embedding
from bank.items.prompt import encode_pair
from bank.lookup.embedder import Embedder
from bank.lookup.prior import personal_shares, surprise
from bank.lookup.serving import ServingBank
from bank.lookup.signature import MAX_ITEMS, Signature
from bank.lookup.weights import TOPIC_GRAIN, AnchorWeight, common_recipe, evident_weights, make_recipe, topic_weights
from bank.rules import SignatureRule

NUMBER_BYTES, EMBEDDED_BYTES = 4, 2
"""A number of a signature or a histogram, and one of a profile's embedding, as they are kept."""


@dataclass(slots=True)
class Evidence:
    """What is known of a person before any query; made once, however many methods and seeds need it.

    Attributes:
        person: whose it is.
        pairs: encoded profile items, the oldest first.
        learnt: the same as few-shot training sees them, some with past items in the prompt where the bank's rows were
            trained so.
        embedding: of the profile, [E].
        trained: outcomes of few-shot training, by method and seed.
        signature, gains: what the items say about the anchors, predicted and measured; None until asked for.
    """

    person: Person
    pairs: Sequence[Example]
    learnt: Sequence[Example]
    embedding: Vectors
    trained: dict[tuple[EvalMethod, int], Judgement] = field(default_factory=dict)
    signature: Signature | None = None
    gains: Vectors | None = None


class Adapters:
    """Finds and trains adapters.

    Args:
        bank: under evaluation.
        task_bank: the one that `--baselines` made, or None.
        scorer: the base model, for what is trained and measured.
        embedder: the bank's.
        plan: of few-shot training, for `stacked` and `own`; its seed is not used.
        strength: of the anchors beneath a stacked adapter, as a share of theirs when merged.
        max_tokens: longest example.
    """

    def __init__(
        self,
        bank: OpenBank,
        task_bank: OpenBank | None,
        scorer: Scorer,
        embedder: Embedder,
        *,
        plan: AdaptConfig,
        strength: float,
        max_tokens: int,
    ) -> None:
        self.bank = bank
        self._task_bank = task_bank
        self._scorer = scorer
        self._embedder = embedder
        self._plan = plan
        self._strength = strength
        self._max_tokens = max_tokens
        self._signer: Signer | None = None

    def evidence(self, person: Person) -> Evidence:
        """What methods start from."""
        task = self.bank.serving.task
        texts = [item_text(item, task) for item in person.history.items]
        pairs = [encode_pair(self._scorer.tokenizer, *pair, self._max_tokens) for pair in person.history.pairs(task)]
        learnt = [
            lesson.example(self._scorer.tokenizer, self._max_tokens)
            for lesson in lessons(person.history, task, self.bank.manifest.history_share, seed=0)
        ]
        return Evidence(person, pairs, learnt, profile_embedding(self._embedder.embed(texts)))

    def make(self, method: EvalMethod, evidence: Evidence, seed: int) -> PersonAdapter | None:
        """A method's adapter for the person; None for the bare one. The seed is for random anchors and training.

        Raises:
            BankError: when the method needs what the bank lacks.
        """
        if method.base in (Base.PRIOR, Base.BASE):
            return None
        if method.base is Base.TASK:
            bank = self._task()
            return PersonAdapter(bank, common_recipe(bank.manifest))
        adapter = PersonAdapter(self.bank, self._recipe(method, evidence, seed))
        if not method.trained:
            return adapter
        trained = self._trained(adapter, method, evidence, seed)
        if trained is None and method.base is Base.STACKED:
            return self.make(replace(method, base=Base.MERGED), evidence, seed)
        return replace(adapter, trained=trained)

    def _trained(self, adapter: PersonAdapter, method: EvalMethod, evidence: Evidence, seed: int) -> LoraWeights | None:
        """What is trained on top of an adapter; None where it was rejected, or there is nothing to learn from."""
        if not evidence.learnt:
            return None
        if (method.plain, seed) not in evidence.trained:
            plan = replace(self._plan, seed=seed)
            judgement = train_user(self._scorer.bare(), adapter.lora(), evidence.learnt, plan).finish()
            evidence.trained[method.plain, seed] = judgement
        return evidence.trained[method.plain, seed].weights

    def habits(self, person: Person, examples: Sequence[Example]) -> list[Reading]:
        """What the person's past answers alone say of their next ones; no model reads anything.

        Args:
            person: whose profile and queries they are.
            examples: the queries; a surprise is shared among an answer's tokens, as a model's loss is.

        Raises:
            BankError: when the bank has no prior.
        """
        prior, task = self.bank.manifest.prior, self.bank.serving.task
        if prior is None:
            raise BankError(
                f"this bank has no histogram of answers: task {task.name} has free answers, or the bank was built "
                "before banks had one: leave out `prior`, or build it again"
            )
        shares = personal_shares(prior, [gold for _, gold in person.history.pairs(task)])
        likeliest = max(shares, key=lambda answer: shares[answer])
        return [
            Reading(surprise(shares, query.gold) / example.output_tokens, likeliest)
            for query, example in zip(person.queries, examples, strict=True)
        ]

    def kept_bytes(self, method: EvalMethod, evidence: Evidence, adapter: PersonAdapter | None) -> int:
        """What a server keeps of the person for a method: embedding, signature, user adapter, past items, a histogram.

        Args:
            method: the method.
            evidence: the person's.
            adapter: what `make` made of the two.
        """
        manifest, kept = self.bank.manifest, 0
        if method.base is Base.PRIOR and manifest.prior:
            kept += NUMBER_BYTES * len(manifest.prior.shares)
        if method.base in (Base.MERGED, Base.STACKED):
            kept += EMBEDDED_BYTES * manifest.embedder.dim
            by_topic = (method.source or manifest.weights.source) == "topic"
            kept += 0 if by_topic else NUMBER_BYTES * len(manifest.anchors)
        if adapter and (user := adapter.user_adapter):
            kept += len(encode_user_adapter(manifest.layout, user))
        if method.history:
            items = evidence.person.history.items
            kept += sum(len(json.dumps(dict(item.fields), ensure_ascii=False).encode()) for item in items)
        return kept

    def _recipe(self, method: EvalMethod, evidence: Evidence, seed: int) -> FusionRecipe:
        """The recipe of a method that fuses, without what is trained on top of it."""
        manifest = self.bank.manifest
        if method.base in (Base.COMMON, Base.OWN):
            if not manifest.common:
                raise BankError(f"`{method.base}` needs the common row, but this bank has none")
            return common_recipe(manifest)
        share = self._strength if method.base is Base.STACKED else 1.0
        by_topic = method.base in (Base.MERGED, Base.STACKED) and (method.source or manifest.weights.source) == "topic"
        return make_recipe(manifest, self._weights(method, evidence, seed), share, TOPIC_GRAIN if by_topic else 1)

    def _weights(self, method: EvalMethod, evidence: Evidence, seed: int) -> Sequence[AnchorWeight]:
        serving = _with_k(self.bank.serving, method.k)
        rule, index = serving.manifest.weights, serving.index
        merged = rule.signature or rule
        if method.base is Base.MEAN:
            return [AnchorWeight(anchor, merged.strength / index.anchors, 0.0) for anchor in range(index.anchors)]
        if method.base is Base.RANDOM:
            chance = random.Random(f"{seed}:{evidence.person.user_id}")
            drawn = chance.sample(range(index.anchors), min(rule.anchors, index.anchors))
            return [AnchorWeight(anchor, merged.strength / len(drawn), 0.0) for anchor in drawn]
        source = method.source or rule.source
        if source == "topic":
            return topic_weights(index, rule, evidence.embedding)
        if source == "evidence":
            anchors = range(index.anchors)
            cosines, gains = index.vectors(anchors) @ evidence.embedding, self._measured_gains(evidence)
            tokens = output_tokens(self._signed(evidence))
            usual = SignatureRule(anchors=method.k) if method.k else SignatureRule()
            return evident_weights(rule.signature or usual, anchors, gains, cosines, tokens)
        return serving.personalise(evidence.embedding, self._signature(evidence)).weights

    def _signature(self, evidence: Evidence) -> Signature:
        if evidence.signature is None:
            if not self.bank.serving.signs:
                raise BankError("this bank has no signatures: build it with --weights signature")
            evidence.signature = self._sign().signature(self.bank.manifest.short, self._signed(evidence))
        return evidence.signature

    def _sign(self) -> Signer:
        model = self._scorer.bare()
        if self._signer is None:
            self._signer = Signer(model, self.bank.matrix, at_common=self.bank.manifest.signed)
        return self._signer

    def _measured_gains(self, evidence: Evidence) -> Vectors:
        """By how much each anchor lowers the loss of the items, against the centre: one pass each."""
        if evidence.gains is None:
            evidence.gains = self._sign().measured_gains(self._signed(evidence))
        return evidence.gains

    def _signed(self, evidence: Evidence) -> Sequence[Example]:
        return evidence.pairs[-MAX_ITEMS:]

    def _task(self) -> OpenBank:
        if self._task_bank is None:
            raise BankError("`task` needs the task's row: build the bank with --baselines")
        return self._task_bank


def _with_k(serving: ServingBank, k: int | None) -> ServingBank:
    """The bank with another k in its rule of weights."""
    if k is None:
        return serving
    rule = serving.manifest.weights
    changes: dict[str, object] = {"anchors": k}
    if rule.signature:
        changes["signature"] = rule.signature.model_copy(update={"anchors": k})
    if rule.posterior:
        changes["posterior"] = rule.posterior.model_copy(update={"anchors": k})
    weights = rule.model_copy(update=changes)
    return ServingBank(serving.manifest.model_copy(update={"weights": weights}), serving.index, serving.curvature)
