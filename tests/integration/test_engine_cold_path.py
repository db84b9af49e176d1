"""From a name that nobody has asked for to a slot: done once, measured where it happens, right under load."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.rig.engine import Engine, running_engine
from bench.rig.processes import command_line, descendants, standing_still
from bench.rig.tiny import tiny_bank
from tests.support.engine import text_of

SLOTS = 2
KINDS = ("check", "fuse", "slot_write", "bring_in", "load")
COUNTS = ("fuses", "slot_evictions", "shared_slots")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    return tiny_bank(folder, tiny_model_folder, embedder_folder, anchors=40, scale=0.2)


@pytest.fixture(scope="module")
def engine(bank: Path, tiny_model_folder: Path) -> Iterator[Engine]:
    with running_engine(bank, tiny_model_folder, dtype="float32", max_loras=SLOTS) as engine:
        yield engine


def counted(engine: Engine) -> dict[str, float]:
    """How often each thing has happened."""
    durations = {kind: engine.metric(f"mta_engine_{kind}_seconds_count") for kind in KINDS}
    return durations | {count: engine.metric(f"mta_engine_{count}_total") for count in COUNTS}


def grown(engine: Engine, before: dict[str, float]) -> dict[str, float]:
    """What has happened since."""
    return {name: value - before[name] for name, value in counted(engine).items() if value != before[name]}


def test_a_new_recipe_is_fused_and_written_once_and_each_part_is_timed(engine: Engine, prefix: str) -> None:
    before, recipe = counted(engine), f"{prefix}:c+a01*500"
    text_of(engine.chat(recipe))
    assert grown(engine, before) == {"check": 1, "fuse": 1, "fuses": 1, "slot_write": 1, "bring_in": 1}
    text_of(engine.chat(recipe))
    text_of(engine.chat("base"))
    assert grown(engine, before) == {"check": 2, "fuse": 1, "fuses": 1, "slot_write": 1, "bring_in": 1}
    for kind in KINDS:
        assert 0 <= engine.metric(f"mta_engine_{kind}_seconds_sum") < 600


def test_slots_that_change_hands_are_counted(engine: Engine, prefix: str) -> None:
    recipes = [f"{prefix}:c+a{i:02d}*400" for i in range(2, 2 + SLOTS + 1)]
    for recipe in recipes:
        text_of(engine.chat(recipe))
    before = counted(engine)
    text_of(engine.chat(recipes[0]))  # its slot was the last one's; its weights are still in memory
    assert grown(engine, before) == {"check": 1, "slot_write": 1, "bring_in": 1, "slot_evictions": 1}


def test_two_requests_for_a_new_recipe_at_once_fuse_it_once_and_share_its_slot(engine: Engine, prefix: str) -> None:
    before, recipe = counted(engine), f"{prefix}:c+a09*777"
    with ThreadPoolExecutor(2) as pool:
        with standing_still(*descendants(engine.pid)):  # the model, so that both are there before a step
            answers = [pool.submit(engine.chat, recipe) for _ in range(2)]
            while engine.metric("mta:adapter_names_leased") < 1 or engine.metric("mta_engine_shared_slots_total") < (
                before["shared_slots"] + 1
            ):
                pass
        one, other = (text_of(answer.result()) for answer in answers)
    assert one == other
    seen = grown(engine, before)
    assert seen == {"check": 2, "fuse": 1, "fuses": 1, "slot_write": 1, "bring_in": 1, "shared_slots": 1} | {
        name: value for name, value in seen.items() if name == "slot_evictions"
    }


def test_many_new_recipes_at_once_through_few_slots_are_all_answered_as_alone(engine: Engine, prefix: str) -> None:
    recipes = [f"{prefix}:c+a{i:02d}*600" for i in range(10, 30)]
    before = counted(engine)
    with ThreadPoolExecutor(len(recipes)) as pool:
        together = [text_of(answer) for answer in pool.map(lambda name: engine.chat(name, max_tokens=2), recipes)]
    assert grown(engine, before)["fuses"] == len(recipes)
    assert together == [text_of(engine.chat(name, max_tokens=2)) for name in recipes]
    assert len(set(together)) > 1


def test_metrics_are_answered_while_the_model_stands_still(engine: Engine) -> None:
    before = counted(engine)
    core = next(pid for pid in descendants(engine.pid) if "EngineCore" in command_line(pid))
    with standing_still(core):
        assert engine.metric("mta_engine_fuses_total") == before["fuses"]
    assert counted(engine) == before
