"""Recipe names and their engine ids: bounded, stable while held, never beyond int32."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st

from server.engine.admission.prepare import MAX_ID, AdapterNames


def make_names(capacity: int, in_flight: set[str] | None = None, next_id: int = 1) -> AdapterNames:
    return AdapterNames({}, capacity=capacity, in_flight=lambda: in_flight or set(), next_id=next_id)


def pass_by(names: AdapterNames, count: int, prefix: str = "n") -> None:
    """So many other names, each used once."""
    for number in range(count):
        names.lease(f"{prefix}{number}")
        names.release(f"{prefix}{number}")


def test_a_name_keeps_its_id_while_it_is_leased_or_in_flight_inside_the_engine() -> None:
    in_flight = {"running"}
    names = make_names(4, in_flight)
    held, running = names.lease("held"), names.lease("running")
    names.release("running")
    pass_by(names, 100)
    assert names.lease("held") is held
    assert names.lease("running") is running
    names.release("running")
    in_flight.clear()
    pass_by(names, 100, "m")
    assert names.lease("running").lora_int_id != running.lora_int_id


def test_the_least_recently_used_name_goes_first() -> None:
    names = make_names(8)
    ids = {name: names.lease(name).lora_int_id for name in "abcdefgh"}
    for name in ids:
        names.release(name)
    for name in ("a", "new"):  # the first is used again
        names.lease(name)
        names.release(name)
    assert names.lease("a").lora_int_id == ids["a"]
    assert names.lease("b").lora_int_id != ids["b"]


def test_ids_start_over_below_int32_and_skip_those_in_use() -> None:
    late = make_names(8, next_id=MAX_ID)
    assert late.lease("last").lora_int_id == MAX_ID
    assert late.lease("first again").lora_int_id == 1


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=200))
def test_held_names_have_distinct_and_unchanging_ids(steps: list[tuple[str, bool]]) -> None:
    names = make_names(2)
    held: dict[str, list[int]] = {}
    bound = 0
    for name, take in steps:
        if take:
            held.setdefault(name, []).append(names.lease(name).lora_int_id)
        elif held.get(name):
            held[name].pop()
            names.release(name)
        current = {n: ids for n, ids in held.items() if ids}
        assert all(len(set(ids)) == 1 for ids in current.values())
        assert len({ids[0] for ids in current.values()}) == len(current)
        assert names.leased == len(current)
        bound = 2 + len(current) if take else bound  # names give way when another one comes
        assert len(names) <= bound
