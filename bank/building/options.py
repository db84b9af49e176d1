"""What a bank is built from and how: inputs, options, and their record in the manifest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from bank.errors import BankError
from bank.lookup.signature import MAX_ANCHORS
from bank.manifest import PosteriorRule, WeightRule

TOPIC_STRENGTH = 0.5  # the sum of a topic recipe's weights: topics may mislead, so half is left to the common row
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
T = TypeVar("T")


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
    """Everything that shapes a bank, apart from its people. The budgets are those of docs/quality.md."""

    task: str
    anchors: Count = 12
    anchors_by: Literal["topics", "longest"] = "topics"
    rank: Count = 8
    user_rank: NotNegative = 8
    target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(_names)] = None
    k: Count = 2
    steps: Count = 8
    common_steps: Count = 160
    batch_size: Count = 8
    common_batch_size: Count = 16
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    history_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_tokens: Count = 512
    verdict: bool = True
    describe: bool = False
    seed: NotNegative = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"

    def resolved(self) -> BuildOptions:
        from bank.models.load import resolve_dtype

        dtype: Any = resolve_dtype(self.dtype)
        return dataclasses.replace(self, dtype=dtype)

    def rule(self) -> WeightRule:
        """The bank's rule of weights; of more anchors than a signature may have, topics alone speak."""
        posterior = PosteriorRule(anchors=self.anchors) if self.anchors <= MAX_ANCHORS else None
        return WeightRule(anchors=min(self.k, self.anchors), strength=TOPIC_STRENGTH, posterior=posterior)

    def record(self, key: str, people: int) -> dict[str, int | float | str | bool | None]:
        """The manifest's `training`: every option, how many people there were, and the key of all inputs."""
        modules = ",".join(self.target_modules) if self.target_modules else None
        return {**dataclasses.asdict(self), "target_modules": modules, "people": people, "inputs": key}


@checked_dataclass(frozen=True, slots=True)
class ImportOptions(_Checked):
    """How imported adapters become a bank. They have no A in common: recipes are fused by `cat`."""

    task: str = "chat"
    user_rank: NotNegative = 8
    k: Count = 2


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """Where a build reads and writes; default models are prepared in `cache_dir`, and None is the default embedder."""

    users: Path
    out: Path
    model: str
    cache_dir: Path
    outputs: Path | None = None
    exclude: Path | None = None
    embedder: Path | None = None
    force: bool = False
