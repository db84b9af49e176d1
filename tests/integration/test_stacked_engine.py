"""User adapters in a real vLLM: stacked as their formula says, refused where anything is wrong, dropped on demand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import torch
from transformers import AutoModelForCausalLM

from adapters.matrix import MetaMatrix
from adapters.recipe import FusionMethod, FusionRecipe, Term, UserAdapterId
from adapters.user_adapter import UserAdapter
from bank.manifest import BankManifest, read_manifest
from bank.matrix import open_matrix
from bench.oracle.dense import stacked_adapter, token_logprobs
from bench.rig.engine import Engine, running_engine
from bench.rig.processes import descendants, paused, wait_until
from bench.rig.tiny import tiny_bank
from bench.rig.user_adapters import keep_user_adapter, random_user_adapter
from bench.rig.valkey import ValkeyProcess

TOLERANCE = 1e-3
PROMPT = "Write a line about the sea, and then another one. "
USER, ADAPTER = "a" * 25 + "e", "b" * 25 + "e"


@dataclass(frozen=True, slots=True)
class Served:
    """An engine over one bank, and the Redis that it fetches user adapters from."""

    engine: Engine
    manifest: BankManifest
    matrix: MetaMatrix
    valkey: ValkeyProcess

    def recipe(self, *terms: Term, adapter: str = ADAPTER) -> FusionRecipe:
        terms = terms or (Term(0, 400), Term(3, 300))
        return FusionRecipe(self.manifest.short, self.manifest.method, True, terms, UserAdapterId(USER, adapter))

    def keep(self, recipe: FusionRecipe, user: UserAdapter, **changes: Any) -> None:
        """Store an adapter as promotion does."""
        keep_user_adapter(self.valkey.url, recipe, user, self.manifest, **changes)

    def forget(self) -> None:
        with redis.Redis.from_url(self.valkey.url) as client:
            client.delete(f"mta:{{{USER}}}:adapter")
        self.engine.client.post("/mta/v1/drop", json={"user_key": USER}).raise_for_status()


@pytest.fixture(scope="module", params=[FusionMethod.SHARED, FusionMethod.CAT])
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    embedder_folder: Path,
    valkey: ValkeyProcess,
) -> Iterator[Served]:
    bank = tiny_bank(
        tmp_path_factory.mktemp("bank"), tiny_model_folder, embedder_folder, method=request.param, scale=0.1
    )
    manifest = read_manifest(bank)
    matrix = open_matrix(bank, manifest)
    with running_engine(bank, tiny_model_folder, dtype="float32", max_loras=1, redis_url=valkey.url) as engine:
        yield Served(engine, manifest, matrix, valkey)


@pytest.fixture
def stacked(served: Served) -> Iterator[Served]:
    """The same, with no user adapter anywhere."""
    served.forget()
    yield served
    served.forget()


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


def tokens_of(engine: Engine) -> list[int]:
    ids: list[int] = engine.client.post("/tokenize", json={"model": "base", "prompt": PROMPT}).json()["tokens"]
    return ids


def test_a_stacked_answer_is_that_of_the_dense_sum(stacked: Served, model: Any) -> None:
    recipe = stacked.recipe()
    user = random_user_adapter(stacked.manifest, recipe)
    stacked.keep(recipe, user)
    ids = tokens_of(stacked.engine)
    merged = torch.tensor(stacked.engine.prompt_logprobs(recipe.plain.name, ids))
    with stacked_adapter(model, stacked.matrix, recipe, user):
        wanted = token_logprobs(model, ids)
    answer = torch.tensor(stacked.engine.prompt_logprobs(recipe.name, ids))
    torch.testing.assert_close(answer, wanted, atol=TOLERANCE, rtol=0)
    assert (merged - wanted).abs().max() > 10 * TOLERANCE
    again = torch.tensor(stacked.engine.prompt_logprobs(recipe.plain.name, ids))
    torch.testing.assert_close(again, merged, atol=TOLERANCE, rtol=0)


def test_who_loses_the_only_slot_and_gets_it_back_ten_times_has_the_same_adapter(stacked: Served) -> None:
    """Its weights are kept meanwhile: whatever were done to them in place would be done each time."""
    recipe, engine = stacked.recipe(), stacked.engine
    stacked.keep(recipe, random_user_adapter(stacked.manifest, recipe))
    names, ids = (recipe.name, recipe.plain.name), tokens_of(engine)
    first = {name: engine.prompt_logprobs(name, ids) for name in names}
    fused, written = engine.metric("mta_engine_fuses_total"), engine.metric("mta_engine_slot_write_seconds_count")
    for _ in range(10):
        assert {name: engine.prompt_logprobs(name, ids) for name in names} == first
    assert first[names[0]] != first[names[1]]
    assert engine.metric("mta_engine_slot_write_seconds_count") == written + 20
    assert engine.metric("mta_engine_fuses_total") == fused


def refused(stacked: Served, recipe: FusionRecipe) -> str:
    response = stacked.engine.chat(recipe.name)
    assert response.status_code == httpx.codes.NOT_FOUND
    error = response.json()["error"]
    assert error["param"] == "model"
    assert stacked.engine.chat(recipe.plain.name).status_code == httpx.codes.OK
    assert stacked.engine.status()["user_adapters"] == 0
    return str(error["message"])


def test_an_adapter_that_is_not_there_is_a_404(stacked: Served) -> None:
    recipe = stacked.recipe()
    assert "does not exist; the plain recipe is" in refused(stacked, recipe)
    stacked.keep(recipe, random_user_adapter(stacked.manifest, recipe))
    assert "does not exist" in refused(stacked, stacked.recipe(adapter="c" * 25 + "e"))


def test_a_dropped_user_is_neither_held_nor_resident(stacked: Served) -> None:
    recipe = stacked.recipe()
    stacked.keep(recipe, random_user_adapter(stacked.manifest, recipe))
    stacked.engine.chat(recipe.name).raise_for_status()
    assert recipe.name in stacked.engine.resident()["resident"]
    assert stacked.engine.resident()["held"] == [recipe.name]
    response = stacked.engine.client.post("/mta/v1/drop", json={"user_key": USER})
    assert response.json() == {"held": 0}
    assert stacked.engine.status()["user_adapters"] == 0
    assert recipe.name not in stacked.engine.resident()["resident"]
    assert stacked.engine.resident()["held"] == []


def test_what_an_open_stream_uses_is_dropped_when_it_has_ended(stacked: Served) -> None:
    recipe = stacked.recipe()
    stacked.keep(recipe, random_user_adapter(stacked.manifest, recipe))
    engine = stacked.engine
    engine.chat(recipe.name).raise_for_status()

    def still_held() -> int:
        return int(engine.client.post("/mta/v1/drop", json={"user_key": USER}).json()["held"])

    with ExitStack() as open_stream:
        with paused(*descendants(engine.pid)):  # the model, so that the answer cannot end before
            lines = open_stream.enter_context(engine.long_answer(recipe.name))
            assert still_held() == 1
        assert [line for line in lines if line][-1] == "data: [DONE]"
    wait_until(lambda: still_held() == 0, "the request to be over")  # its last line is out a little before
    assert engine.resident()["held"] == []
