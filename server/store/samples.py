"""Encodings of samples, training configuration and loss curves, shared by gateway and worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import orjson

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig
from server.store.base import decode

MAX_SAMPLES = 1000  # maximum number of samples stored per user

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """An example of an answer that the user wants."""

    messages: Messages  # conversation, ending with the user's turn
    output: str  # the wanted answer

    @property
    def pair(self) -> tuple[str, str]:
        return self.messages[-1]["content"], self.output


@dataclass(frozen=True, slots=True)
class JobBudget:
    """Upper limits for one job; fields as in `AdaptConfig`."""

    max_tokens: int
    max_seconds: int


Point = tuple[int, float]  # a step number, counted over all runs of a job, and its loss in nats per output token


@dataclass(frozen=True, slots=True)
class Curve:
    """Progress of training; empty before it starts."""

    phase: str = ""  # current activity, in a few words
    loss: tuple[Point, ...] = ()  # training loss
    held_out: tuple[Point, ...] = ()  # loss on held-out samples
    runs: tuple[tuple[int, str], ...] = ()  # the steps done before each training run, and its phase
    shown: tuple[str, ...] = ()  # a held-out input, the answer wanted, and the model's without and with the adapter


NO_CURVE = Curve()


def encode_sample(sample: Sample) -> bytes:
    return orjson.dumps(sample)


def decode_sample(raw: bytes) -> Sample:
    value = orjson.loads(raw)
    return Sample(value["messages"], value["output"])


def encode_config(config: AdaptConfig) -> str:
    return orjson.dumps(config).decode()


def decode_config(text: str) -> AdaptConfig:
    """Decode a configuration; missing fields get their defaults, and `newer_than_ms` of older versions is ignored.

    Raises `TrainingError` for an invalid value, and `ValueError` for a text that is not a configuration and for an
    unknown field: to ignore it would not train what was requested.
    """
    value = orjson.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"the job's configuration is not a JSON object: {excerpt(value)}")
    value.pop("newer_than_ms", None)
    unknown = sorted(value.keys() - {field.name for field in fields(AdaptConfig)})
    if unknown:
        raise ValueError(
            f"the job's configuration has the field {excerpt(unknown[0])}, which this version does not know: "
            "another version's gateway made it, so update gateways and workers and send the samples again"
        )
    return AdaptConfig(**value)


def decode_curve(text: str) -> Curve:
    """Decode a curve; empty text is an empty curve. Raises `ValueError` if invalid."""
    return decode(Curve, text) if text else NO_CURVE
