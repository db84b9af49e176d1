"""Inputs and options of a bank's build, and their record in the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from adapters.recipe import MAX_DIRECTIONS
from adapters.training.example import Acts
from bank.errors import BankError
from bank.manifest import PosteriorRule, WeightRule

MOST_PEOPLE = 64  # with more anchors, the rows are directions by default
TOPIC_STRENGTH = 0.5  # sum of a topic recipe's weights; topics are weak evidence, so the common row keeps half
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
T = TypeVar("T")


def _split_names(given: object) -> object:
    if given and isinstance(given, str):
        return tuple(part.strip() for part in given.split(","))
    return given or None


class _Checked:
    """Options that are validated on creation; BankError names the first invalid one."""

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, given: Any, validate: ModelWrapValidatorHandler[T]) -> T:
        try:
            return validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            option = f"--{first['loc'][0]}".replace("_", "-")
            raise BankError(f"{option}: {first['msg']}, got {first['input']!r}") from None


@checked_dataclass(frozen=True, slots=True)
class BuildOptions(_Checked):
    """All options of a build, apart from its inputs. The default budgets are those of docs/quality.md."""

    task: str
    anchors: Count = 12
    anchors_by: Literal["topics", "longest"] = "topics"
    directions: Annotated[int, Field(ge=0, le=MAX_DIRECTIONS)] | None = None  # None: chosen; 0: the anchors' own rows
    rank: Count = 8
    user_rank: NotNegative = 8
    target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(_split_names)] = None
    k: Count = 2
    steps: Count = 8
    common_steps: Count = 160
    batch_size: Count = 8
    common_batch_size: Count = 16
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    history_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    acts: Acts = Acts.EVERYWHERE
    max_tokens: Count = 512
    verdict: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # k-means takes no larger one
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"

    @property
    def wants_directions(self) -> bool:
        return self.anchors > MOST_PEOPLE if self.directions is None else self.directions > 0

    def rule(self, decay: float | None = None) -> WeightRule:
        posterior = PosteriorRule() if decay is None else PosteriorRule(decay=decay)
        return WeightRule(anchors=min(self.k, self.anchors), strength=TOPIC_STRENGTH, posterior=posterior)

    def record(self) -> dict[str, int | float | str | bool | None]:
        """Return all options as the manifest's field `training` has them."""
        return asdict(self) | {"target_modules": ",".join(self.target_modules or ()) or None}


@checked_dataclass(frozen=True, slots=True)
class ImportOptions(_Checked):
    """Options of an import. Imported adapters do not share A, so their recipes are fused by `cat`."""

    task: str = "chat"
    user_rank: NotNegative = 8
    k: Count = 2


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """Paths and models of a build; default models are prepared in `cache_dir`, and None means the default embedder."""

    users: Path
    out: Path
    model: str
    cache_dir: Path
    outputs: Path | None = None
    exclude: Path | None = None
    embedder: Path | None = None
    force: bool = False
    template: Path | None = None  # of chats; None: the model's own
