"""What few-shot adapting starts from and is compared with: what a user would get and have without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bank.items.histories import History
from bank.items.profile import Item
from bank.items.tasks import get_task
from bench.adapt import users
from mta_client import Client
from server.worker.training import AdapterTrainer

FULL, HALF = "mta3:00000000:shared:c+a00*1000", "mta3:00000000:shared:c+a00*500"
PERSON = History("ann", (Item("1", {"input": "Any plans?", "output": "The sea."}),))
USER_KEY, ADAPTER_ID = "a" * 26, "e" * 26


class Served:
    """A server whose jobs all end in one way, and whose adapters speak where nothing else is asked for."""

    def __init__(self, state: str) -> None:
        adapter = ADAPTER_ID if state == "succeeded" else None
        self.job = SimpleNamespace(id=f"{USER_KEY}.1", state=state, adapter=adapter)

    def forget(self, *_: object, **__: object) -> None: ...

    def put_profile(self, *_: object) -> None: ...

    def adapt(self, *_: object, **__: object) -> Any:
        return self.job

    def wait(self, _: str) -> Any:
        return self.job

    def generate(self, *_: object, personalize: str = "auto", **__: object) -> Any:
        stacked = self.job.adapter is not None and personalize == "auto"
        level, recipe = ("stacked", HALF) if stacked else ("merged", FULL)
        return SimpleNamespace(personalization=SimpleNamespace(level=level, recipe=recipe))


@contextmanager
def attached(_: object, adapter: str) -> Iterator[Any]:
    yield SimpleNamespace(model=adapter)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> AdapterTrainer:
    """On a model whose loss says which adapter is on it."""
    losses = {FULL: 1.0, HALF: 2.0, f"{HALF} and raw": 0.5}
    monkeypatch.setattr(users, "until_signed", lambda *_: set())
    monkeypatch.setattr(users, "fuse", lambda _, recipe, __: recipe.name)
    monkeypatch.setattr(users, "decode_user_adapter", lambda _, raw: raw.decode())
    monkeypatch.setattr(users, "stack", lambda beneath, user, _: f"{beneath} and {user}")
    monkeypatch.setattr(users, "attached", attached)
    monkeypatch.setattr(users, "mean_loss", lambda adapter, _: losses[adapter])
    nothing = SimpleNamespace(matrix=None, model=None, tokenizer=None, manifest=SimpleNamespace(layout=None))
    return cast(AdapterTrainer, nothing)


@pytest.mark.parametrize(("state", "raw", "stacked"), [("succeeded", b"raw", 0.5), ("rejected", b"", 1.0)])
def test_an_adapter_on_half_the_anchors_is_compared_with_all_of_them(
    trainer: AdapterTrainer, state: str, raw: bytes, stacked: float
) -> None:
    reading = users._adapted(cast(Client, Served(state)), PERSON, get_task("chat"))
    assert (reading.adapter is not None) == (state == "succeeded")
    reading.raw = raw
    users._score(trainer, reading, [])
    assert (reading.merged, reading.stacked) == (1.0, stacked)
