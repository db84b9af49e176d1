"""What gateway and worker share about adapting as bytes: samples, configuration and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import orjson

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig

MAX_SAMPLES = 1000
"""Most samples kept for a user."""

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
    """The inverse of `encode_config`; missing fields get their defaults.

    Raises:
        ValueError: when the text is not a configuration, or has a field that this version does not know: ignoring it
            would not train what was asked for.
        TrainingError: naming a value that cannot be trained with.
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
