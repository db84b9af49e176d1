"""What gateway and worker share about adapting: samples, configuration and curves, as values and as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from typing import Literal

import orjson

from adapters.errors import excerpt

AdapterKind = Literal["lora", "core"]
"""`adapters.user_adapter.UserAdapterKind`, for code that cannot import torch."""

CORE_STEPS, CORE_LEARNING_RATE = 16, 2e-2
"""A core only transforms the fused adapter's small weights, so it takes more and larger steps."""

MAX_SAMPLES = 1000
"""Most samples kept for a user."""

BATCH_SIZE = 4
"""Samples a step."""

LOOK_EVERY = 2
"""Steps between two evaluations of the held-out loss."""

# The values of `adapters/training/user_trainer.py`, which needs torch; a test keeps them equal.
FOLDS = 2
FEW = 20

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One example of how a user wants to be answered.

    Attributes:
        messages: the conversation, ending with the user's turn.
        output: what the answer should have been.
    """

    messages: Messages
    output: str


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    """How a user adapter is trained; recorded with the job, so that the same job gives the same bytes.

    The defaults are those with which ten samples of people outside the bank helped most on their later items, over two
    tasks (docs/quality.md).

    Attributes:
        kind: what is trained (`adapters/user_adapter.py`).
        rank: of a `lora`; a `core` has the fused adapter's.
        steps: most optimiser steps of one run; it ends earlier once nothing more is learnt.
        learning_rate: after the warm-up.
        holdout: share of the samples that is held out if there are many.
        strength: weight of the anchors beneath it, relative to when merged; below 1 only with a common row.
        seed: of everything random.
        max_tokens: most tokens that all runs together may read, held-out samples included.
        max_seconds: longest time that one worker trains.
    """

    kind: AdapterKind = "lora"
    rank: int = 2
    steps: int = 8
    learning_rate: float = 1e-3
    holdout: float = 0.2
    strength: float = 0.5
    seed: int = 0
    max_tokens: int = 2_000_000
    max_seconds: int = 3600


@dataclass(frozen=True, slots=True)
class JobBudget:
    """The most that one job may use; the fields are those of `AdaptConfig`."""

    max_tokens: int
    max_seconds: int


Point = tuple[int, float]
"""A step, counted over all runs of a job, and a loss in nats per output token."""


@dataclass(frozen=True, slots=True)
class Curve:
    """How training goes.

    Attributes:
        phase: what is being done, in a few words; empty before anything is.
        loss: of the steps' samples.
        held_out: of samples that are not trained on.
    """

    phase: str = ""
    loss: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()


NO_CURVE = Curve()
"""Of a job before it trains."""


def default_config(room: int, common: bool, kind: AdapterKind | None = None) -> AdaptConfig:
    """How a job trains by default.

    Args:
        room: the rank that the bank leaves for users; if 0, only a core can be served.
        common: whether the bank has a common row.
        kind: the requested kind, if any.
    """
    if (kind or ("lora" if room else "core")) == "core":
        return AdaptConfig(kind="core", steps=CORE_STEPS, learning_rate=CORE_LEARNING_RATE, strength=1.0)
    usual = AdaptConfig()
    return replace(usual, rank=max(1, min(usual.rank, room)), strength=usual.strength if common else 1.0)


def tokens_read(config: AdaptConfig, lengths: Sequence[int]) -> int:
    """Roughly the most tokens that the runs of a job read, in training and on held-out samples.

    Args:
        config: how it trains.
        lengths: of its samples, in tokens; at least one sample.
    """
    return ceil(_samples_read(config, len(lengths)) * sum(lengths) / len(lengths))


def room_for_past(config: AdaptConfig, lengths: Sequence[int]) -> int:
    """How many tokens of past items may stand before all samples together, in a job that reads no more than it may.

    Args:
        config: how it trains, and how much it may read.
        lengths: of its samples without past items, in tokens; at least one sample.
    """
    return max(0, int(config.max_tokens * len(lengths) / _samples_read(config, len(lengths))) - sum(lengths))


def _samples_read(config: AdaptConfig, count: int) -> int:
    """How many samples all runs read, each as often as it is read."""
    steps = config.steps
    looks = 1 + ceil(steps / LOOK_EVERY)
    if count == 1:
        return max(1, steps // 2) + 2
    if count <= FEW:
        held = [len(range(fold, count, FOLDS)) for fold in range(FOLDS)]
        folds = sum(steps * min(BATCH_SIZE, count - aside) + looks * aside for aside in held)
        return folds + steps * min(BATCH_SIZE, count)
    return steps * BATCH_SIZE + looks * max(1, round(config.holdout * count))


def encode_sample(sample: Sample) -> bytes:
    """A sample as JSON."""
    return orjson.dumps({"messages": list(sample.messages), "output": sample.output})


def decode_sample(raw: bytes) -> Sample:
    """The inverse of `encode_sample`."""
    value = orjson.loads(raw)
    return Sample(value["messages"], value["output"])


def encode_config(config: AdaptConfig) -> str:
    """A configuration as JSON."""
    return orjson.dumps(asdict(config)).decode()


def decode_config(text: str) -> AdaptConfig:
    """The inverse of `encode_config`; fields missing from an earlier gateway's record get their defaults.

    Raises:
        ValueError: when the text is not a configuration, or has a field that this version does not know: ignoring it
            would not train what was asked for.
    """
    value = orjson.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"the job's configuration is not a JSON object: {excerpt(value)}")
    unknown = sorted(value.keys() - {field.name for field in fields(AdaptConfig)})
    if unknown:
        raise ValueError(
            f"the job's configuration has the field {excerpt(unknown[0])}, which this version does not know: a newer "
            "gateway made it, so update this worker and send the samples again"
        )
    return AdaptConfig(**value)


def encode_curve(curve: Curve) -> bytes:
    """A curve as JSON."""
    return orjson.dumps(asdict(curve))


def decode_curve(text: str) -> Curve:
    """The inverse of `encode_curve`; an empty text is an empty curve.

    Raises:
        ValueError, KeyError, TypeError: when the text is not a curve.
    """
    if not text:
        return NO_CURVE
    value = orjson.loads(text)
    loss, held_out = (tuple((int(step), float(loss)) for step, loss in value[name]) for name in ("loss", "held_out"))
    return Curve(str(value["phase"]), loss, held_out)
