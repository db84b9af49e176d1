"""The methods an evaluation compares, by name; each builds a user's adapter with the serving code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from adapters.lora import LoraWeights
from adapters.recipe import MAX_TERMS
from adapters.training.adapt_config import AdaptConfig
from adapters.training.example import Example
from adapters.training.user_trainer import Beneath, train_user
from adapters.user_adapter import encode_user_adapter
from bank.building.selection import mean_embedding
from bank.building.signer import Signer
from bank.errors import BankError
from bank.items.histories import History, Query
from bank.items.lessons import encode_with_memories, lessons
from bank.items.profile import Vectors, own_texts
from bank.items.prompt import chat_messages, encode_conversation, encode_pair
from bank.items.retrieval import ItemIndex
from bank.items.tasks import AnswerKind, past_count_range
from bank.lookup.embedder import Embedder
from bank.lookup.index import AnchorIndex
from bank.lookup.phrases import NO_PHRASES, TrustedPhrases, as_served
from bank.lookup.prior import SCORES, personal_shares, surprise
from bank.lookup.serving import AnchorWeight, ServingBank
from bank.lookup.signature import MAX_ITEMS, Signature
from bank.manifest import PosteriorRule
from evaluation.scoring import EvalAdapter, OpenBank, Reading, Scorer

SHARE_BYTES, HALF_BYTES = 4, 2  # stored bytes per number: histograms; embeddings and signatures
SIGNATURE_HEADER_BYTES = 20  # bank, tokens, time and length in a profile record
MAX_HISTORY, MAX_PROFILE_ITEMS = 16, 20


@dataclass(slots=True)
class Evidence:
    """What is known about a user before any query, for all methods."""

    user: History
    signature_examples: Sequence[Example]  # profile items the signature is computed from
    embedding: Vectors  # profile embedding [E]
    signature: Signature | None = None  # computed on first use
    # Few-shot adapters by recipe and seed; None if one was not promoted.
    trained: dict[tuple[str, int], LoraWeights | None] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Evaluator:
    bank: OpenBank
    scorer: Scorer  # the base model
    embedder: Embedder
    max_tokens: int = 512  # longest example; each past item in the prompt may add the same number
    config: AdaptConfig = field(default_factory=AdaptConfig)  # few-shot training; its seed is not used
    _signer: Signer | None = field(init=False, default=None)

    def evidence(self, user: History) -> Evidence:
        task = self.bank.serving.task
        pairs = user.pairs(task)[-MAX_ITEMS:]
        signed = [encode_pair(self.scorer.tokenizer, *pair, self.max_tokens) for pair in pairs]
        return Evidence(user, signed, mean_embedding(user.items, task, self.embedder))

    def adapter(self, method: Method, evidence: Evidence, seed: int) -> EvalAdapter | None:
        """Return a method's adapter, or None for the bare model; the seed decides random anchors and training."""
        if method.k:
            count = min(method.k, len(self.bank.manifest.anchors))
            if method.adapter == "mean":
                return self.equal(range(count))
            return self.fused(evidence, serving=self._first(count))
        return ADAPTERS[method.adapter](self, evidence, seed)

    def _first(self, count: int) -> ServingBank:
        """Return the bank as if it had only its first anchors: with fewer draws of people each is trusted more."""
        serving, rule = self.bank.serving, self.bank.manifest.weights
        if serving.directions:
            raise BankError("merged@k needs a bank whose rows are its anchors' own: build it with --directions 0")
        fraction = count / serving.index.anchor_count
        posterior = rule.posterior and PosteriorRule(decay=rule.posterior.decay * fraction)
        rule = rule.model_copy(update={"anchors": min(rule.anchors, count), "posterior": posterior})
        index = AnchorIndex.build(serving.index.vectors(range(count)))
        curvature = serving.curvature and serving.curvature.first(count)
        manifest = serving.manifest.model_copy(update={"weights": rule})
        return replace(serving, manifest=manifest, index=index, curvature=curvature)

    def common(self, bank: OpenBank) -> EvalAdapter:
        if not bank.manifest.common:
            raise BankError("`common` and `own` need the common row, but this bank has none")
        return EvalAdapter(bank, bank.manifest.common_recipe)

    def random(self, seed: str) -> EvalAdapter:
        """Return as many random anchors as a topic recipe has."""
        everybody, count = range(len(self.bank.manifest.anchors)), self.bank.manifest.weights.anchors
        return self.equal(random.Random(seed).sample(everybody, min(count, len(everybody))))

    def equal(self, anchors: Sequence[int]) -> EvalAdapter:
        weight = self.bank.manifest.weights.strength / len(anchors)
        recipe = self.bank.serving.merge([AnchorWeight(anchor, weight, 0.0) for anchor in anchors])
        return EvalAdapter(self.bank, recipe)

    def fused(self, evidence: Evidence, scale: float = 1.0, serving: ServingBank | None = None) -> EvalAdapter:
        """Return the adapter that serving would fuse for the user; `scale` as in `ServingBank.personalise`."""
        serving = serving or self.bank.serving
        if serving.manifest.has_signatures and evidence.signature is None:
            model = self.scorer.bare()
            self._signer = self._signer or Signer(model, self.bank.matrix, self.bank.manifest.acts)
            evidence.signature = self._signer.signature(self.bank.manifest.short, evidence.signature_examples)
        if signature := evidence.signature:
            signature = replace(signature, products=signature.products[: serving.index.anchor_count])
        return EvalAdapter(self.bank, serving.personalise(evidence.embedding, signature, scale).recipe)

    def stacked(self, evidence: Evidence, seed: int) -> EvalAdapter:
        return self.trained(lambda known: (self.fused(known, self.config.strength), self.fused(known)), evidence, seed)

    def own(self, evidence: Evidence, seed: int) -> EvalAdapter:
        """Return a few-shot adapter without anchors."""
        common = self.common(self.bank)
        return self.trained(lambda known: (common, common), evidence, seed)

    def trained(
        self, beneath: Callable[[Evidence], tuple[EvalAdapter, EvalAdapter]], evidence: Evidence, seed: int
    ) -> EvalAdapter:
        """Stack a few-shot adapter on the first of what `beneath` makes; return the second if none was promoted."""
        ground, without = beneath(evidence)
        taught = lessons(evidence.user, self.bank.serving.task, self.bank.manifest.history_share, seed=0)
        unsigned = len(taught) - len(evidence.signature_examples)  # older than the newest, which are signed

        def unseen(held: Sequence[int]) -> Beneath:
            if not held:
                return Beneath(ground.lora(), {}, shared=self.bank.shared)
            signed = enumerate(evidence.signature_examples, unsigned)
            kept = [example for position, example in signed if position not in held]
            fused, served = beneath(Evidence(evidence.user, kept, evidence.embedding))
            rivals = {"without it": served.lora, "the base model": lambda: None}
            if self.bank.manifest.common:
                rivals["the common row"] = self.common(self.bank).lora
            texts = [lesson.output for position, lesson in enumerate(taught) if position not in held]
            judged = as_served(self.bank.manifest, self.scorer.tokenizer, texts)
            return Beneath(fused.lora(), rivals, judged, self.bank.shared)

        key = (ground.recipe.name, seed)
        if taught and key not in evidence.trained:
            examples = [lesson.example(self.scorer.tokenizer, self.max_tokens) for lesson in taught]
            judgement = train_user(self.scorer.bare(), unseen, examples, replace(self.config, seed=seed)).finish()
            evidence.trained[key] = judgement.weights
        weights = evidence.trained.get(key)
        return replace(ground, trained=weights) if weights else without

    def read(
        self, method: Method, evidence: Evidence, adapter: EvalAdapter | None, new_tokens: int = 0
    ) -> tuple[list[Example], list[Reading]]:
        """Return the user's queries as model input, and their readings; `new_tokens` as in `Scorer`."""
        task, user = self.bank.serving.task, evidence.user
        index = ItemIndex(task, user.items if method.history else ())
        examples = [self._example(query, index.memories(query.input, method.history)) for query in user.queries]
        phrases = self.phrases(method, evidence)
        if phrases:
            examples = [phrases.mixed(example) for example in examples]
        if method.adapter == "prior":
            return examples, self._read_prior(user, examples)
        chances = task.kind == "score" and not phrases
        return examples, self.scorer.read(adapter, examples, new_tokens, chances=chances, phrases=phrases)

    def phrases(self, method: Method, evidence: Evidence) -> TrustedPhrases:
        """Return what a method mixes in, made of the user's texts as a worker does; BankError without trust."""
        rule = self.bank.manifest.phrases
        if not method.words:
            return NO_PHRASES
        if rule is None:
            raise BankError("this bank was built without trust in phrases: build it again, or leave out `+words`")
        texts = own_texts(evidence.user.items, self.bank.serving.task)
        return TrustedPhrases.of(self.scorer.tokenizer, texts, rule.trust)

    def _example(self, query: Query, memories: Sequence[str]) -> Example:
        """Return a query as model input; one that is too long is cut alike with past items and without."""
        tokenizer, task, pair = self.scorer.tokenizer, self.bank.serving.task, (query.input, query.gold)
        if len(encode_conversation(tokenizer, chat_messages(query.input), query.gold).ids) > self.max_tokens:
            return encode_pair(tokenizer, *pair, self.max_tokens)
        longest = self.max_tokens * (1 + len(memories))
        return encode_with_memories(tokenizer, task, *pair, memories=memories, max_tokens=longest)

    def kept_bytes(self, method: Method, evidence: Evidence, adapter: EvalAdapter | None) -> int:
        """Return the bytes a server stores per user for a method: embedding, signature, adapter, items, histogram."""
        manifest, kept = self.bank.manifest, 0
        if method.adapter == "prior" and manifest.prior:
            kept += SHARE_BYTES * len(manifest.prior.shares)
        if method.adapter in ("merged", "merged:topic", "stacked"):
            kept += HALF_BYTES * manifest.embedder.dim
        if method.adapter in ("merged", "stacked") and manifest.has_signatures:
            kept += SIGNATURE_HEADER_BYTES + HALF_BYTES * manifest.personal_rows
        if adapter and (user := adapter.user_adapter):
            kept += len(encode_user_adapter(manifest.layout, user))
        kept += self.phrases(method, evidence).table.nbytes
        for item in evidence.user.items if method.history else ():
            kept += len(json.dumps(dict(item.fields), ensure_ascii=False).encode())
        return kept

    def _read_prior(self, user: History, examples: Sequence[Example]) -> list[Reading]:
        """Predict the user's answers from their past answers; the loss is per token of the answer, as a model's is."""
        prior, task = self.bank.manifest.prior, self.bank.serving.task
        if prior is None:
            raise BankError(
                f"this bank has no histogram of answers, because the answers of {task.name} are free text or its "
                "adapters were imported: leave out `prior`"
            )
        fractions = personal_shares(prior, [gold for _, gold in user.pairs(task)])
        likeliest = max(fractions, key=lambda answer: fractions[answer])
        chances = [fractions[score] for score in SCORES] if task.kind == "score" else []
        return [
            Reading(surprise(fractions, query.gold) / example.output_tokens, likeliest, chances)
            for query, example in zip(user.queries, examples, strict=True)
        ]


ADAPTERS: dict[str, Callable[[Evaluator, Evidence, int], EvalAdapter | None]] = {
    "prior": lambda of, user, seed: None,  # uses no model: see `Evaluator.read`
    "base": lambda of, user, seed: None,
    "common": lambda of, user, seed: of.common(of.bank),
    "task": lambda of, user, seed: of.common(of.bank.task_bank),
    "mean": lambda of, user, seed: of.equal(range(len(of.bank.manifest.anchors))),
    "random": lambda of, user, seed: of.random(f"{seed}:{user.user.user_id}"),
    # The paper's rule, then the bank's own rule, which is used in serving.
    "merged:topic": lambda of, user, seed: EvalAdapter(of.bank, of.bank.serving.personalise(user.embedding).recipe),
    "merged": lambda of, user, seed: of.fused(user),
    "stacked": Evaluator.stacked,  # merged at reduced strength plus a few-shot adapter; merged if that was rejected
    "own": Evaluator.own,
}


@dataclass(frozen=True, slots=True)
class Method:
    """An adapter, with past items in the prompt (`merged+history@h3`) or as a curve point (`merged@k4`, `@n5`)."""

    adapter: str  # a key of `ADAPTERS`
    history: int = 0  # number of the user's most relevant past items in the prompt
    k: int | None = None  # the bank as if it had only its first k anchors; None for all
    items: int | None = None  # number of the profile's last items in use; None for all
    words: bool = False  # whether the user's phrase table is mixed in

    @property
    def name(self) -> str:
        point = f"@k{self.k}" if self.k else f"@n{self.items}" if self.items else ""
        history = f"+history@h{self.history}" if self.history else ""
        return f"{self.adapter}{point}{history}" + ("+words" if self.words else "")

    @property
    def on_curve(self) -> bool:
        return self.k is not None or self.items is not None

    @property
    def trained(self) -> bool:
        return self.adapter in ("stacked", "own")


METHODS = {
    method.name: method
    for method in (
        *(Method(adapter) for adapter in ADAPTERS),
        *(Method(adapter, n) for adapter in ADAPTERS if adapter != "prior" for n in range(1, MAX_HISTORY + 1)),
        *(Method(adapter, k=k) for adapter in ("mean", "merged") for k in range(1, MAX_TERMS + 1)),
        *(Method("merged", items=n) for n in range(1, MAX_PROFILE_ITEMS + 1)),
    )
}
METHODS |= {
    name: method
    for plain in METHODS.values()
    if plain.adapter != "prior" and not plain.on_curve
    for method in (replace(plain, words=True),)
    for name in (method.name, *(["words"] if plain.name == "common" else []))
}

DEFAULT = "base,common,task,mean,random,merged,stacked,own"
REMEMBERING = ("base", "common", "task", "merged", "stacked", "own")  # also run with past items in the prompt
REPEATING = ("common", "merged", "stacked", "own")  # also run with phrase tables


def parse_methods(text: str) -> list[Method]:
    names = dict.fromkeys(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in METHODS]:
        raise BankError(
            f"{unknown[0]!r} is not a method. Methods are {', '.join(ADAPTERS)}; mean and merged take @k4 (the bank's "
            "first 4 anchors), merged takes @n5 (the last 5 items); all except prior take +history@h3 (3 past items in "
            "the prompt) and +words (their phrase table; `words` alone is common+words)"
        )
    return [METHODS[name] for name in names]


def default_methods(kind: AnswerKind, words: bool = True) -> list[Method]:
    """Return the methods to compare; with `words`, where answers are texts, some of them with phrase tables too."""
    plain = parse_methods(DEFAULT if kind == "text" else f"prior,{DEFAULT}")
    plain += [Method(adapter, count) for adapter in REMEMBERING for count in past_count_range(kind)]
    wanted = REPEATING if words and kind == "text" else ()
    return plain + [replace(method, words=True) for method in plain if method.adapter in wanted]


def curves(anchors: int, items: int) -> list[Method]:
    """Return `merged` and `mean` of several numbers of anchors, and `merged` of numbers of items below `items`."""
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < anchors} | {min(anchors, MAX_TERMS)} - {0})
    ns = [n for n in (1, 2, 5, 10, MAX_PROFILE_ITEMS) if n < items]
    return [Method(adapter, k=k) for k in ks for adapter in ("merged", "mean")] + [
        Method("merged", items=n) for n in ns
    ]
