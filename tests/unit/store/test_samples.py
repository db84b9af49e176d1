"""Job ids and adapt configurations as they are kept: old ones are read, nothing of a newer one is dropped."""

from __future__ import annotations

import json

import pytest

from adapters.errors import TrainingError
from adapters.training.adapt_config import AdaptConfig
from server.store.jobs import JobId, parse_job_id
from server.store.samples import decode_config, encode_config

USER = "axi2q2svfyrolurh6ecirfzy3m"
OLD = '{"rank":2,"steps":16,"learning_rate":0.02,"holdout":0.2,"strength":1.0,"seed":0}'


@pytest.mark.parametrize("number", [1, 10, 9_999_999_999])
def test_a_job_id_comes_back_from_its_text(number: int) -> None:
    assert parse_job_id(f"{USER}.{number}") == JobId(USER, number)
    assert str(JobId(USER, number)) == f"{USER}.{number}"


@pytest.mark.parametrize("text", ["", "a", "a.", ".1", "a.01", "a.-1", "a.1.2", "a.x", "a/b.1", "a.²"])
def test_any_other_text_is_refused(text: str) -> None:
    assert parse_job_id(text) is None
    assert parse_job_id(text.replace("a", USER, 1)) is None


def test_a_configuration_comes_back_as_it_was() -> None:
    config = AdaptConfig(rank=1, steps=3, max_tokens=1000, max_seconds=60)
    assert decode_config(encode_config(config)) == config


def test_a_record_of_an_earlier_gateway_gets_the_usual_budget() -> None:
    config, usual = decode_config(OLD), AdaptConfig()
    assert (config.steps, config.learning_rate) == (16, 0.02)
    assert (config.max_tokens, config.max_seconds) == (usual.max_tokens, usual.max_seconds)


@pytest.mark.parametrize(
    ("text", "shown"),
    [(OLD.replace('"seed"', '"optimizer":"sgd","seed"'), "'optimizer'"), ("[1]", "[1]"), ("{", ""), ("", "")],
)
def test_what_this_version_does_not_know_is_named(text: str, shown: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode_config(text)
    assert shown in str(caught.value)


WRONG = [("steps", 0), ("learning_rate", "fast"), ("learning_rate", 0), ("rank", "2"), ("rank", 0), ("holdout", 1)]


@pytest.mark.parametrize(("field", "value"), [*WRONG, ("seed", None)])
def test_a_value_that_nothing_can_be_trained_with_is_named(field: str, value: object) -> None:
    with pytest.raises(TrainingError, match=field):
        decode_config(json.dumps(json.loads(OLD) | {field: value}))
