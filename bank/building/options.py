"""What a bank is built from and how: inputs, options, and their record in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from adapters.recipe import FusionMethod
from bank.errors import BankError
from bank.lookup.signature import MAX_ANCHORS
from bank.rules import PosteriorRule, SignatureRule, WeightRule

_SIGNATURE = SignatureRule()
_POSTERIOR = PosteriorRule()
_TOPIC_STRENGTH = 0.5

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
T = TypeVar("T")

_USER_RANK, _TOP = 8, 2
POSTERIOR, LONGEST = "posterior", "longest"
USUAL = dict.fromkeys(("chat", "movie_rating", "news_headline"), (0.5, POSTERIOR))
"""`history_share` and `weights` by default, where others than 0 and `auto` were found to help (docs/quality.md)."""


def _names(given: object) -> object:
    """Of a text, its parts between commas; None if there is nothing in it."""
    return tuple(part.strip() for part in given.split(",")) if given and isinstance(given, str) else given or None


class _Checked:
    """Options whose values are checked when they are made: a BankError names the first that makes no sense."""

    @model_validator(mode="wrap")
    @classmethod
    def _named(cls, given: Any, made: ModelWrapValidatorHandler[T]) -> T:
        try:
            return made(given)
        except ValidationError as error:
            first = error.errors()[0]
            option = f"--{first['loc'][0]}".replace("_", "-")
            raise BankError(f"{option}: {first['msg']}, got {first['input']!r}") from None


@checked_dataclass(frozen=True, slots=True)
class BuildOptions(_Checked):
    """Everything that shapes a bank, apart from its people. The budgets are those of docs/quality.md.

    `strength` is by default 1, or a half beside a common row: topics may mislead. `history_share` and `weights` are by
    default those of `USUAL`.
    """

    task: str
    anchors: Count = 12
    anchors_by: Literal["topics", "longest"] = "topics"
    method: FusionMethod = FusionMethod.SHARED
    common: bool = True
    rank: Count = 8
    user_rank: NotNegative = _USER_RANK
    target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(_names)] = None
    k: Count = _TOP
    strength: Share | None = None
    weights: Literal["auto", "topic", "signature", "posterior"] | None = None
    signature_k: Count = _SIGNATURE.anchors
    signature_strength: Share = _SIGNATURE.strength
    tau: Factor = _SIGNATURE.tau
    kappa: Factor = _SIGNATURE.kappa
    decay: Positive = _POSTERIOR.decay
    steps: Count = 8
    common_steps: Count = 160
    epochs: Positive | None = None
    batch_size: Count = 8
    common_batch_size: Count = 16
    learning_rate: Rate = 1e-3
    common_learning_rate: Rate = 1e-3
    history_share: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Count = 512
    verdict: bool = True
    describe: bool = False
    seed: NotNegative = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"

    def resolved(self) -> BuildOptions:
        """The same, with what depends on task and machine decided."""
        from bank.models.load import resolve_dtype

        share, weights = USUAL.get(self.task, (0.0, "auto"))
        if not (self.common and self.method is FusionMethod.SHARED and self.anchors <= MAX_ANCHORS):
            weights = "auto"
        share, weights = share if self.history_share is None else self.history_share, self.weights or weights
        found: dict[str, Any] = {"dtype": resolve_dtype(self.dtype), "history_share": share, "weights": weights}
        return dataclasses.replace(self, **found)

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


@checked_dataclass(frozen=True, slots=True)
class ImportOptions(_Checked):
    """How imported adapters become a bank. They have no A in common: recipes are fused by `cat`."""

    task: str = "chat"
    user_rank: NotNegative = _USER_RANK
    k: Count = _TOP


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
