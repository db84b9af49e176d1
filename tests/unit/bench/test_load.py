"""Load on an engine, against a server of a few lines that streams as many tokens as it is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bench.rig.engine import KEY
from bench.serving.load import Ask, Loader, Prompts, loading
from tests.unit.bench.streaming import Streaming


@pytest.fixture
def server() -> Iterator[Streaming]:
    with Streaming() as running:
        yield running


@pytest.fixture
async def loader(server: Streaming) -> AsyncIterator[Loader]:
    async with loading(server.engine) as (loader,):
        yield loader


async def test_a_stream_has_a_first_token_and_gaps_between_the_others(loader: Loader, server: Streaming) -> None:
    answer = await loader.stream(Ask("a", [5, 6, 7], 4))
    assert (answer.tokens, len(answer.gaps_ms)) == (4, 3)
    assert answer.first_ms > 0
    (body,) = server.seen.bodies
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("a", [5, 6, 7], 4)
    assert (body["ignore_eos"], body["temperature"]) == (True, 0)
    assert server.seen.keys == {f"Bearer {KEY}"}


async def test_a_closed_loop_asks_everything_once_with_so_many_clients_and_no_shared_cache(
    loader: Loader, server: Streaming
) -> None:
    answers, seconds = await loader.closed_loop(iter([Ask(f"user-{n}", [1], 3) for n in range(20)]), 4)
    assert len(answers) == 20
    assert seconds > 0
    assert sorted(body["model"] for body in server.seen.bodies) == sorted(f"user-{n}" for n in range(20))
    assert len({body["cache_salt"] for body in server.seen.bodies}) == 20
    assert server.seen.most == 4


async def test_arrivals_do_not_wait_for_answers(loader: Loader, server: Streaming) -> None:
    answers = await loader.arriving([Ask("a", [1], 200) for _ in range(6)], per_s=2000)
    assert [answer.tokens for answer in answers] == [200] * 6
    assert server.seen.most == 6


async def test_a_failure_ends_the_run(loader: Loader) -> None:
    with pytest.raises(RuntimeError, match="bad was not answered"):
        await loader.together([Ask("a", [1], 1), Ask("bad", [1], 1)])


def test_prompts_are_ordinary_tokens_and_never_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    prompts = Prompts(tmp_path)
    made = [tuple(prompts(12)) for _ in range(50)]
    assert len(set(made)) == 50
    assert all(len(prompt) == 12 and min(prompt) >= 250 and max(prompt) < 750 for prompt in made)
