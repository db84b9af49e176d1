"""What the gateway refuses of samples, with an engine that counts a token for each character."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.errors import InvalidRequest
from server.gateway.users.adapting import SampleChecks
from server.store.samples import Sample, encode_sample

SAMPLE_TOKENS = 1024


@pytest.mark.parametrize(("context", "longest"), [(512, 512), (131_072, SAMPLE_TOKENS), (None, SAMPLE_TOKENS)])
async def test_a_sample_that_is_too_long_is_refused_with_both_lengths(context: int | None, longest: int) -> None:
    async def count_tokens(messages: list[dict[str, str]]) -> int:
        return sum(len(message["content"]) for message in messages)

    engines: Any = SimpleNamespace(context=context, count_tokens=count_tokens)
    turns: Any = None
    checks = SampleChecks(engines, turns, SAMPLE_TOKENS)
    fits, long = (encode_sample(Sample([{"role": "user", "content": "?"}], "x" * n)) for n in (longest - 1, longest))
    await checks.check_lengths([fits])
    with pytest.raises(InvalidRequest, match=f"{longest + 1} tokens.*at most {longest}") as caught:
        await checks.check_lengths([fits, long])
    assert (caught.value.param, caught.value.code) == ("samples.1", "context_length_exceeded")
