"""What a bank is built from and how: the options, their record in the manifest, and the key that both make."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.recipe import FusionMethod
from bank.build.calibration import Calibration
from bank.errors import BankError
from bank.items.histories import History
from bank.items.tasks import Task
from bank.manifest import SignatureRule, WeightRule

_SIGNATURE = SignatureRule()
_TOPIC_STRENGTH = 0.5
_COUNTS = (
    "anchors",
    "rank",
    "k",
    "signature_k",
    "steps",
    "common_steps",
    "batch_size",
    "common_batch_size",
    "max_tokens",
)
WEIGHTS = ("auto", "topic", "signature")
_BUILD_FORMAT = 4  # part of the key: raise it when the same inputs would give another bank


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything that shapes a bank, its people aside. The budgets are those of docs/quality.md.

    Attributes:
        task: a name of `bank/items/tasks.toml`.
        anchors: N.
        method: how its recipes are fused.
        common: whether it has a common row.
        rank: R of every meta-LoRA.
        user_rank: room for stacked user adapters.
        target_modules: last parts of module names; every linear layer when None.
        weights: what speaks for a user: `topic`, `signature`, or `auto`: signatures where the bank can have them.
        k: most anchors of a recipe, by topic.
        strength: what their weights sum to; without a value all of it, or half beside a common row, for topics may
            mislead.
        signature_k, signature_strength: the same by signature.
        tau, kappa: how much evidence counts, and topics beside it.
        steps, common_steps: optimiser steps of an anchor and of the common row.
        epochs: passes over the data instead of steps.
        batch_size, common_batch_size: examples a step.
        learning_rate, common_learning_rate: peaks.
        max_tokens: longest example.
        seed: of selection and training.
        dtype: of the frozen base while training: `auto`, `bfloat16` or `float32`.
    """

    task: str
    anchors: int = 12
    method: FusionMethod = FusionMethod.SHARED
    common: bool = True
    rank: int = 8
    user_rank: int = 8
    target_modules: tuple[str, ...] | None = None
    weights: str = "auto"
    k: int = 2
    strength: float | None = None
    signature_k: int = _SIGNATURE.anchors
    signature_strength: float = _SIGNATURE.strength
    tau: float = _SIGNATURE.tau
    kappa: float = _SIGNATURE.kappa
    steps: int = 8
    common_steps: int = 160
    epochs: float | None = None
    batch_size: int = 8
    common_batch_size: int = 16
    learning_rate: float = 1e-3
    common_learning_rate: float = 1e-3
    max_tokens: int = 512
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise BankError(f"--weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise BankError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "common_learning_rate"):
            if not 0 < getattr(self, name) < 1:
                raise BankError(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("strength", "signature_strength"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise BankError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {value}")
        for name in ("tau", "kappa"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BankError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise BankError(f"--epochs must be above 0, got {self.epochs}")
        if self.user_rank < 0 or self.seed < 0:
            raise BankError(f"--user-rank and --seed cannot be negative, got {self.user_rank} and {self.seed}")

    def rule(self, calibration: Calibration | None = None) -> WeightRule:
        """The bank's rule of weights, with one for signatures where they are calibrated."""
        usual = _TOPIC_STRENGTH if self.common else 1.0
        strength = usual if self.strength is None else self.strength
        topic = WeightRule(anchors=min(self.k, self.anchors), strength=strength)
        if calibration is None:
            return topic
        signature = SignatureRule(
            anchors=min(self.signature_k, self.anchors),
            strength=self.signature_strength if self.common else 1.0,
            tau=self.tau,
            kappa=self.kappa,
            slope=calibration.slope,
            offsets=tuple(calibration.offsets.tolist()),
        )
        return topic.model_copy(update={"signature": signature})

    def record(self, key: str, people: int) -> dict[str, int | float | str | bool | None]:
        """The manifest's `training`: every option, how many people there were, and the key of them all."""
        fields: dict[str, int | float | str | bool | None] = {}
        for name, value in dataclasses.asdict(self).items():
            fields[name] = ",".join(value) if isinstance(value, tuple) else str(value) if name == "method" else value
        return {**fields, "people": people, "inputs": key}


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """Where a build reads and writes.

    Attributes:
        users: people's histories.
        out: the bank's folder.
        model: the base model's name, as in the settings.
        cache_dir: where default models are prepared.
        outputs: LaMP's outputs, beside LaMP's own questions.
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


def inputs_key(options: BuildOptions, task: Task, people: Sequence[History], model_hash: str, embedder_id: str) -> str:
    """SHA-256 (64 hex digits) of all that decides what the bank will be: equal keys, equal banks."""
    content = {
        "format": _BUILD_FORMAT,
        "options": dataclasses.asdict(options),
        "task": dataclasses.asdict(task),
        "people": [[person.user_id, [[item.id, dict(item.fields)] for item in person.items]] for person in people],
        "model": model_hash,
        "embedder": embedder_id,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
