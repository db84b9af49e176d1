"""Whom `stall` and `thrash` ask as, and the tables they make; the servers are stand-ins that only stream."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.rig.engine import KEY, Engine
from bench.serving import stall, thrash
from bench.serving.load import Ask, loading
from tests.unit.bench.streaming import Streaming

Stand = dict[str, Streaming]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """The servers that a benchmark starts, by flavour."""
    with Streaming() as ours, Streaming() as stock:
        servers = {"ours": ours, "stock": stock}

        @contextmanager
        def stand_in(_: object, flavour: str = "ours", **__: object) -> Iterator[Engine]:
            yield servers[flavour].engine

        for module in (stall, thrash):
            monkeypatch.setattr(module, "vllm_server", stand_in)
        yield servers


def table(out: Path) -> list[dict[str, Any]]:
    (found,) = json.loads(out.read_text("utf-8"))["tables"]
    return [dict(zip(found["columns"], line, strict=True)) for line in found["lines"]]


async def test_a_stream_has_a_first_token_and_gaps_and_a_failure_ends_the_run(stand: Stand) -> None:
    async with loading(stand["ours"].engine) as (loader,):
        answer = await loader.stream(Ask("a", [5, 6, 7], 4))
        assert (answer.tokens, len(answer.gaps_ms)) == (4, 3)
        assert answer.first_ms > 0
        (body,) = stand["ours"].seen.bodies
        sent = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        assert body.items() >= sent.items()
        with pytest.raises(RuntimeError, match="bad was not answered"):
            await loader.together([Ask("a", [1], 1), Ask("bad", [1], 1)])


def test_users_go_round_on_both_sides(stand: Stand, tmp_path: Path) -> None:
    thrash.main(tiny_model=True, users=[3, 6], clients=2, requests=6, rounds=2, tokens=3, out=tmp_path / "thrash.json")
    rows = table(tmp_path / "thrash.json")
    sides = [(users, server) for users in (3, 6) for server in ("ours", "stock vLLM")]
    assert [(row["users"], row["server"]) for row in rows] == sides
    assert rows[0]["tokens/s over 3 users'"]["median"] == 1
    assert all(row["tokens/s"]["n"] == 2 and row["first token p99, ms"] >= row["first token p50, ms"] for row in rows)
    for server in stand.values():
        assert server.seen.most == 2
        assert server.seen.keys == {f"Bearer {KEY}"}
        assert len({body["cache_salt"] for body in server.seen.bodies}) == len(server.seen.bodies)
        asked = Counter(body["model"] for body in server.seen.bodies)
        # three blocks of six at each of two levels: the first three users take turns in both
        assert sorted(asked.values()) == [3, 3, 3, 9, 9, 9]
    assert len(stand["stock"].seen.loaded) == 6
    assert set(stand["stock"].seen.loaded) == {body["model"] for body in stand["stock"].seen.bodies}


def test_never_seen_users_come_once_and_resident_ones_again(stand: Stand, tmp_path: Path) -> None:
    out = tmp_path / "stall.json"
    stall.main(tiny_model=True, per_s=200, arrivals=8, streams=2, pairs=2, slots=8, out=out)
    rows = table(out)
    assert [row["who arrives"] for row in rows] == list(stall.KINDS)
    assert rows[0]["p99 over resident's"]["n"] == 2
    assert rows[1]["p99 over resident's"] is None
    assert rows[2]["first token of who arrives, ms"] is None
    arrived = Counter(body["model"] for body in stand["ours"].seen.bodies if body["max_tokens"] == 1)
    resident = {body["model"] for body in stand["ours"].seen.bodies if body["max_tokens"] == 2}
    assert len(resident) == stall.RESIDENT
    assert {arrived[name] for name in resident} == {6}  # three blocks of eight over four of them
    assert sum(arrived[name] == 1 for name in arrived.keys() - resident) == 3 * 8
