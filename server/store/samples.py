"""What gateway and worker share about adapting as bytes: samples, configuration and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import orjson

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig

MAX_SAMPLES = 1000  # kept for a user

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One example of how a user wants to be answered."""

    messages: Messages  # the conversation, ending with the user's turn
    output: str  # what the answer should have been


@dataclass(frozen=True, slots=True)
class JobBudget:
    """The most that one job may use; the fields are those of `AdaptConfig`."""

    max_tokens: int
    max_seconds: int


Point = tuple[int, float]
"""A step, counted over all runs of a job, and a loss in nats per output token."""


@dataclass(frozen=True, slots=True)
class Curve:
    """How training goes; empty before it begins."""

    phase: str = ""  # what is being done, in a few words
    loss: tuple[Point, ...] = ()  # of the steps' samples
    held_out: tuple[Point, ...] = ()  # of samples that are not trained on


NO_CURVE = Curve()


def encode_sample(sample: Sample) -> bytes:
    return orjson.dumps({"messages": list(sample.messages), "output": sample.output})


def decode_sample(raw: bytes) -> Sample:
    value = orjson.loads(raw)
    return Sample(value["messages"], value["output"])


def encode_config(config: AdaptConfig) -> str:
    return orjson.dumps(asdict(config)).decode()


def decode_config(text: str) -> AdaptConfig:
    """Missing fields get their defaults.

    Raises `TrainingError` naming a value that cannot be trained with, and `ValueError` of what is no configuration, or
    has a field that this version does not know: ignoring it would not train what was asked for.
    """
    value = orjson.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"the job's configuration is not a JSON object: {excerpt(value)}")
    unknown = sorted(value.keys() - {field.name for field in fields(AdaptConfig)})
    if unknown:
        raise ValueError(
            f"the job's configuration has the field {excerpt(unknown[0])}, which this version does not know: "
            "another version's gateway made it, so update gateways and workers and send the samples again"
        )
    return AdaptConfig(**value)


def encode_curve(curve: Curve) -> bytes:
    return orjson.dumps(asdict(curve))


def decode_curve(text: str) -> Curve:
    """An empty text is an empty curve; raises `ValueError`, `KeyError` or `TypeError` of what is no curve."""
    if not text:
        return NO_CURVE
    value = orjson.loads(text)
    loss, held_out = (tuple((int(step), float(loss)) for step, loss in value[name]) for name in ("loss", "held_out"))
    return Curve(str(value["phase"]), loss, held_out)
