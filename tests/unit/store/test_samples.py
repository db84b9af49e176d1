"""Adapt configurations as bytes: old records are read, and nothing of a newer one is dropped in silence."""

from __future__ import annotations

import pytest

from adapters.training.adapt_config import AdaptConfig
from server.store.samples import decode_config, encode_config

OLD = '{"rank":2,"steps":16,"learning_rate":0.02,"holdout":0.2,"strength":1.0,"seed":0}'


def test_a_configuration_comes_back_as_it_was() -> None:
    config = AdaptConfig(rank=1, steps=3, max_tokens=1000, max_seconds=60)
    assert decode_config(encode_config(config)) == config


def test_a_record_of_an_earlier_gateway_gets_the_usual_budget() -> None:
    config = decode_config(OLD)
    assert (config.steps, config.learning_rate) == (16, 0.02)
    assert (config.max_tokens, config.max_seconds) == (AdaptConfig().max_tokens, AdaptConfig().max_seconds)


@pytest.mark.parametrize(
    ("text", "shown"),
    [(OLD.replace('"seed"', '"optimizer":"sgd","seed"'), "'optimizer'"), ("[1]", "[1]"), ("{", ""), ("", "")],
)
def test_what_this_version_does_not_know_is_named(text: str, shown: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode_config(text)
    assert shown in str(caught.value)
