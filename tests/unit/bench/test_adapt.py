"""What few-shot adapting starts from and is compared with: what a user would get and have without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from bank.items.histories import History
from bank.items.profile import Item
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bench.adapt import __main__ as offline
from bench.adapt import users
from mta_client import Client
from server.worker.training import AdapterTrainer

FULL, HALF = "mta1:00000000:shared:c+a00*1000", "mta1:00000000:shared:c+a00*500"
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


class Worker:
    """A trainer and a bank that note what they are given; no adapter of theirs is any good."""

    task = get_task("chat")
    model = matrix = tokenizer = None

    def __init__(self, signs: bool) -> None:
        self.signs = signs
        self.recipes: list[tuple[object, float]] = []
        self.trained: list[tuple[list[str], list[str]]] = []

    def signature(self, pairs: list[tuple[str, str]]) -> str:
        return f"of {len(pairs)} pairs"

    def personalise(self, _: object, signature: object = None, share: float = 1.0) -> Any:
        self.recipes.append((signature, share))
        return SimpleNamespace(recipe=None)

    def train(self, _: object, samples: Any, __: object, items: Any = ()) -> Any:
        self.trained.append(([sample.output for sample in samples], [item.id for item in items]))
        judgement = SimpleNamespace(steps=1, before=1.0, after=1.0, weights=None)
        return SimpleNamespace(finish=lambda: judgement)


@pytest.mark.parametrize("signs", [False, True])
def test_people_outside_a_bank_are_adapted_as_the_worker_does_it(
    signs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(signs)
    monkeypatch.setattr(offline, "read_manifest", lambda _: None)
    monkeypatch.setattr(offline, "ensure_base_model", lambda *_: None)
    monkeypatch.setattr(offline, "ensure_embedder", lambda *_: None)
    monkeypatch.setattr(AdapterTrainer, "open", lambda *_: worker)
    monkeypatch.setattr(ServingBank, "open", lambda *_: worker)
    embedder = SimpleNamespace(id="e", embed=lambda texts: np.ones((len(texts), 2), np.float32))
    monkeypatch.setattr(Embedder, "load", lambda _: embedder)
    monkeypatch.setattr(offline, "fuse", lambda *_: None)
    monkeypatch.setattr(offline, "encode_pair", lambda *_: None)
    monkeypatch.setattr(offline, "attached", attached)
    monkeypatch.setattr(offline, "mean_loss", lambda *_: 1.0)
    items = [{"id": f"{n}", "input": f"Say {n}", "output": f"{n}!"} for n in range(5)]
    people = [{"user_id": number, "profile": items} for number in (1, 2, 3)]
    users_file, only = tmp_path / "users.json", tmp_path / "only.json"
    users_file.write_text(json.dumps(people), "utf-8")
    only.write_text("[1, 3]", "utf-8")
    offline.main(bank=tmp_path, users=users_file, only=only, samples=3, setting=["2:8:1e-3:0.5"])
    signature = "of 3 pairs" if signs else None
    assert worker.recipes == [(signature, 1.0), (signature, 0.5)] * 2
    assert worker.trained == [(["0!", "1!", "2!"], ["0", "1", "2"])] * 2
