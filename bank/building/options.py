"""What a bank is built from and how: inputs, options, and their record in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from adapters.recipe import FusionMethod
from bank.errors import BankError
from bank.lookup.signature import MAX_ANCHORS
from bank.rules import PosteriorRule, SignatureRule, WeightRule

_SIGNATURE = SignatureRule()
_POSTERIOR = PosteriorRule()
_TOPIC_STRENGTH = 0.5


@dataclass(frozen=True, slots=True)
class Limit:
    """What an option's value must satisfy.

    Attributes:
        words: how a message says so, e.g. `must be at least 1`.
        holds: whether a value satisfies it.
    """

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Option:
    """What a field has besides type and default; the command line and the checks are made from it.

    Attributes:
        help: what it is, in a sentence.
        limit: what its value must satisfy; None allows any.
        shown_default: what help shows for a default of None.
    """

    help: str
    limit: Limit | None = None
    shown_default: str | None = None


COUNT = Limit("must be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Limit("cannot be negative", lambda value: value >= 0)
POSITIVE = Limit("must be above 0", lambda value: 0 < value < float("inf"))
SHARE = Limit("must be above 0 and at most 1", lambda value: 0 < value <= 1)
RATE = Limit("must be between 0 and 1", lambda value: 0 < value < 1)
PART = Limit("must be from 0 to 1", lambda value: 0 <= value <= 1)
FACTOR = Limit("must be 0 or more", lambda value: 0 <= value < float("inf"))


def _one_of(*values: str) -> Limit:
    return Limit(f"must be one of {', '.join(values)}", lambda value: value in values)


def options_of(kind: type) -> dict[str, Option]:
    """The options of a dataclass whose fields are `Annotated[type, Option(…)]`, by field."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in dataclasses.fields(kind)}


def check_limits(options: Any) -> None:
    """Refuse values that make no sense.

    Args:
        options: a dataclass of the kind that `options_of` reads.

    Raises:
        BankError: naming the first such option.
    """
    for field, option in options_of(type(options)).items():
        value = getattr(options, field)
        if option.limit and value is not None and not option.limit.holds(value):
            raise BankError(f"--{field.replace('_', '-')} {option.limit.words}, got {value!r}")


UserRank = Annotated[int, Option("Rank kept free for users' own stacked LoRAs.", NOT_NEGATIVE)]
Top = Annotated[int, Option("Most anchors in a user's recipe.", COUNT)]
_USER_RANK, _TOP = 8, 2
POSTERIOR, TOPICS, LONGEST = "posterior", "topics", "longest"
USUAL = dict.fromkeys(("chat", "movie_rating", "news_headline"), (0.5, POSTERIOR))
"""`history_share` and `weights` by default, where others than 0 and `auto` were found to help (docs/quality.md)."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything that shapes a bank, apart from its people. The budgets are those of docs/quality.md.

    `strength` is by default 1, or a half beside a common row: topics may mislead.
    """

    task: Annotated[str, Option("What the items are: news_headline, movie_rating, chat …")]
    anchors: Annotated[int, Option("Exact number of anchors.", COUNT)] = 12
    anchors_by: Annotated[
        str,
        Option("Who they are: topics (the longest history of each topic) or longest.", _one_of(TOPICS, LONGEST)),
    ] = "topics"
    method: Annotated[FusionMethod, Option("How recipes are fused.")] = FusionMethod.SHARED
    common: Annotated[bool, Option("A row that all users share.")] = True
    rank: Annotated[int, Option("Rank of every meta-LoRA.", COUNT)] = 8
    user_rank: UserRank = _USER_RANK
    target_modules: Annotated[
        tuple[str, ...] | None,
        Option("Comma-separated, e.g. q_proj,v_proj.", shown_default="all linear layers"),
    ] = None
    k: Top = _TOP
    strength: Annotated[
        float | None, Option("What the anchors' weights sum to.", SHARE, shown_default="0.5; 1 with --no-common")
    ] = None
    weights: Annotated[
        str | None,
        Option(
            "What users' weights come from: topic, signature, posterior (steps in either direction, by signature), or "
            "auto (signature where possible).",
            _one_of("auto", "topic", "signature", POSTERIOR),
            shown_default=f"posterior for {', '.join(USUAL)}, else auto",
        ),
    ] = None
    signature_k: Annotated[int, Option("Like --k, by signature.", COUNT)] = _SIGNATURE.anchors
    signature_strength: Annotated[float, Option("Like --strength, by signature.", SHARE)] = _SIGNATURE.strength
    tau: Annotated[float, Option("How much a user's evidence counts.", FACTOR)] = _SIGNATURE.tau
    kappa: Annotated[float, Option("How much topic similarity counts beside it.", FACTOR)] = _SIGNATURE.kappa
    decay: Annotated[float, Option("How much evidence a step by the posterior takes.", POSITIVE)] = _POSTERIOR.decay
    steps: Annotated[int, Option("Optimiser steps per anchor.", COUNT)] = 8
    common_steps: Annotated[int, Option("Optimiser steps of the common row.", COUNT)] = 160
    epochs: Annotated[float | None, Option("Passes over the data, instead of numbers of steps.", POSITIVE)] = None
    batch_size: Annotated[int, Option("Examples per step of an anchor.", COUNT)] = 8
    common_batch_size: Annotated[int, Option("Examples per step of the common row.", COUNT)] = 16
    learning_rate: Annotated[float, Option("Peak learning rate of the anchors.", RATE)] = 1e-3
    common_learning_rate: Annotated[float, Option("Peak learning rate of the common row.", RATE)] = 1e-3
    history_share: Annotated[
        float | None,
        Option(
            "Share of the training items with past items of the same person in the prompt.",
            PART,
            shown_default=f"0.5 for {', '.join(USUAL)}, else 0",
        ),
    ] = None
    max_tokens: Annotated[int, Option("Longest training example.", COUNT)] = 512
    verdict: Annotated[bool, Option("Leave a few people out, and measure on them what the bank gains.")] = True
    describe: Annotated[
        bool, Option("Keep a few typical words of each anchor, for people to look at: they are the anchor's own.")
    ] = False
    seed: Annotated[int, Option("Same inputs and seed, same bank.", NOT_NEGATIVE)] = 0
    dtype: Annotated[
        str, Option("Of the frozen base model: auto, bfloat16 or float32.", _one_of("auto", "bfloat16", "float32"))
    ] = "auto"

    def __post_init__(self) -> None:
        check_limits(self)

    def resolved(self) -> BuildOptions:
        """The same, with what depends on task and machine decided."""
        from bank.models.load import resolve_dtype

        share, weights = USUAL.get(self.task, (0.0, "auto"))
        if not (self.common and self.method is FusionMethod.SHARED and self.anchors <= MAX_ANCHORS):
            weights = "auto"
        share, weights = share if self.history_share is None else self.history_share, self.weights or weights
        return dataclasses.replace(self, dtype=resolve_dtype(self.dtype), history_share=share, weights=weights)

    def rule(self, slope: float | None = None, offsets: Sequence[float] = ()) -> WeightRule:
        """The bank's rule of weights, with one for signatures where a calibration has found its slope and offsets."""
        usual = _TOPIC_STRENGTH if self.common else 1.0
        strength = usual if self.strength is None else self.strength
        topic = WeightRule(anchors=min(self.k, self.anchors), strength=strength)
        if self.weights == POSTERIOR:
            return topic.model_copy(update={"posterior": PosteriorRule(anchors=self.anchors, decay=self.decay)})
        if slope is None:
            return topic
        signature = SignatureRule(
            anchors=min(self.signature_k, self.anchors),
            strength=self.signature_strength if self.common else 1.0,
            tau=self.tau,
            kappa=self.kappa,
            slope=slope,
            offsets=tuple(offsets),
        )
        return topic.model_copy(update={"signature": signature})

    def signs(self) -> bool:
        """Whether the bank is to have signatures, given people to calibrate them on.

        Raises:
            BankError: when they are asked for but impossible.
        """
        shared = self.method is FusionMethod.SHARED
        if self.weights in ("signature", POSTERIOR) and not shared:
            raise BankError(
                f"signatures need --method shared, got {self.method.value}: its anchors have no A in common"
            )
        if self.weights == POSTERIOR and not self.common:
            raise BankError("--weights posterior needs the common row, from which it steps: leave out --no-common")
        if self.weights == POSTERIOR and self.anchors > MAX_ANCHORS:
            raise BankError(f"--weights posterior takes at most {MAX_ANCHORS} anchors, got {self.anchors}")
        return self.weights != "topic" and shared and self.anchors <= MAX_ANCHORS

    def record(self, key: str, people: int) -> dict[str, int | float | str | bool | None]:
        """The manifest's `training`: every option, how many people there were, and the key of all inputs."""
        fields: dict[str, int | float | str | bool | None] = {}
        for name, value in dataclasses.asdict(self).items():
            fields[name] = ",".join(value) if isinstance(value, tuple) else str(value) if name == "method" else value
        return {**fields, "people": people, "inputs": key}


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How imported adapters become a bank. They have no A in common: recipes are fused by `cat`."""

    task: Annotated[str, Option("What the profiles' items are.")] = "chat"
    user_rank: UserRank = _USER_RANK
    k: Top = _TOP

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """Where a build reads and writes.

    Attributes:
        users: people's histories.
        out: the bank's folder.
        model: the base model's name, as in the settings.
        cache_dir: where default models are prepared.
        outputs: LaMP's outputs file, when `users` holds LaMP's own questions.
        exclude: people to leave out.
        embedder: the embedder's folder, or None for the default.
        force: whether a finished bank may be replaced.
    """

    users: Path
    out: Path
    model: str
    cache_dir: Path
    outputs: Path | None = None
    exclude: Path | None = None
    embedder: Path | None = None
    force: bool = False
