"""What `mta verify` learns of a user: items as pairs, recipe and adapter as the gateway sends them to engines."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import SecretStr

from adapters.errors import FusionError
from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.recipe import FusionMethod, FusionRecipe, Term, parse_recipe
from adapters.user_adapter import UserAdapter, encode_user_adapter, stack
from bank.manifest import read_manifest
from bank.matrix import open_matrix
from server.cli.run import verification
from server.settings import Settings
from server.store.tenants.user_key import UserKeys
from tests.support.user_adapters import random_user_adapter

SECRET, ADAPTER = "s" * 32, "b" * 25 + "e"
ITEMS = [{"id": "1", "text": "too short"}, {"id": "2", "input": "Who?", "output": "Ana"}]


class Stored:
    """A user of the tiny bank, as a gateway answers, and what `mta verify` makes of the answer."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.matrix = open_matrix(folder, self.manifest)
        self.recipe = FusionRecipe(self.manifest.short, FusionMethod.SHARED, True, (Term(1, 300),))
        self.trained_on = FusionRecipe(self.manifest.short, FusionMethod.SHARED, True, (Term(2, -400),))
        self.own: UserAdapter = random_user_adapter(self.manifest, self.trained_on)

    def answer(self, *, stale: bool | None) -> Any:
        raw = base64.b64encode(encode_user_adapter(self.manifest.layout, self.own)).decode()
        fields = {"id": ADAPTER, "recipe": self.trained_on.name, "stored": raw}
        known = None if stale is None else {"stale": stale}
        return SimpleNamespace(recipe=self.recipe.name, adapter=known), {"items": ITEMS, "adapter": known and fields}

    def read(self) -> tuple[list[tuple[str, str]], dict[str, LoraWeights]]:
        settings = Settings(secret=SecretStr(SECRET), tenant="acme")
        return verification._of_user(settings, self.manifest, self.matrix, "ana", None)


@pytest.fixture
def stored(tiny_bank_folder: Path) -> Stored:
    return Stored(tiny_bank_folder)


@pytest.mark.parametrize("stale", [None, True])
def test_without_an_adapter_in_use_the_recipe_is_todays(
    stored: Stored, stale: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "call_gateway", lambda *_: stored.answer(stale=stale))
    pairs, adapters = stored.read()
    assert list(adapters) == [stored.recipe.name]
    assert pairs == [("How was your day?", "too short"), ("Who?", "Ana")]


def test_an_adapter_in_use_is_read_on_its_own_recipe(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "call_gateway", lambda *_: stored.answer(stale=False))
    _, adapters = stored.read()
    merged, stacked = adapters
    assert merged == stored.trained_on.name
    key = UserKeys(SECRET, "acme").key("ana")
    assert str(parse_recipe(stacked).user_adapter) == f"{key}.{ADAPTER}"
    wanted = stack(fuse(stored.matrix, stored.trained_on, torch.float32), stored.own, torch.float32)
    assert all(torch.equal(adapters[stacked].b[name], b) for name, b in wanted.b.items())


def test_a_user_of_another_bank_is_refused(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.recipe = FusionRecipe("0" * 8, FusionMethod.SHARED, True, ())
    monkeypatch.setattr(verification, "call_gateway", lambda *_: stored.answer(stale=None))
    with pytest.raises(FusionError, match="belongs to the bank 00000000"):
        stored.read()
