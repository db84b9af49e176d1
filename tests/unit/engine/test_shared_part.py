"""Shared parts of prompts: which tokens the common recipe reads, and which blocks users of a bank find."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request
from vllm.v1.worker.gpu.lora_utils import LoraState, get_num_active_loras_for_dispatch

from adapters.training.example import Acts
from server.engine import shared_part
from server.engine.admission.prepare import AdapterNames, Preparer
from server.engine.shared_part import MAX_ID, SHARED, CommonRecipes, SharedReading, with_shared_blocks

COMMON = LoRARequest(lora_name="mta3:0a0b0c0d:shared:c", lora_int_id=MAX_ID, lora_path="mta3:0a0b0c0d:shared:c")
COMMONS = CommonRecipes({"0a0b0c0d": COMMON})
OTHER_BANK = "mta3:ffffffff:shared:c+a01*500"
ORDER = ["c", "a", "b"]  # of a batch


def recipe(number: int, name: str | None = None) -> LoRARequest:
    name = name or f"mta3:0a0b0c0d:shared:c+a{number:02d}*500"
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=name)


def asking(shared: int) -> SamplingParams:
    return SamplingParams(max_tokens=4, extra_args={SHARED: shared})


@dataclass
class Going:
    """A request of a batch that is computed in random pieces."""

    lora: LoRARequest | None
    prompt: int
    shared: int
    computed: int = 0
    seen: dict[int, int] = field(default_factory=dict)  # the adapter's id that read a token


@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=5))
def test_shared_tokens_alone_are_read_with_the_common_recipe(seed: int, shapes: list[tuple[int, int]]) -> None:
    chance, reading = random.Random(seed), SharedReading(COMMONS)
    lora = [*map(recipe, range(1, 5)), recipe(9, OTHER_BANK), None]
    going = {f"r{at}": Going(chance.choice(lora), *shape) for at, shape in enumerate(shapes)}
    for name, each in going.items():
        reading.add(name, each.lora, asking(each.shared), each.prompt)
    for _ in range(60):
        rows = chance.sample(list(going), chance.randint(1, len(going)))
        scheduled = np.array([chance.randint(1, 8) for _ in rows])
        own = [each.lora.lora_int_id if (each := going[name]).lora else 0 for name in rows]
        computed = [going[name].computed for name in rows]
        ids = reading.mapped(
            tuple(np.repeat(own, scheduled)), {name: row for row, name in enumerate(rows)}, computed, scheduled.tolist()
        )
        assert len(ids) == scheduled.sum()
        for name, count in zip(rows, scheduled, strict=True):
            each, (mine, ids) = going[name], (ids[:count], ids[count:])
            each.seen |= dict(enumerate(mine, each.computed))
            each.computed += int(count)
        if chance.random() < 0.2:  # preempted: it begins anew, or behind what the prefix cache has
            name = chance.choice(list(going))
            going[name].computed = chance.randint(0, going[name].prompt - 1)
            reading.remove(name)
            reading.add(name, going[name].lora, asking(going[name].shared), going[name].prompt)
    for each in going.values():
        own_id = each.lora.lora_int_id if each.lora else 0
        sharing = each.lora is not None and each.lora.lora_name != OTHER_BANK
        for at, found in each.seen.items():
            is_shared = sharing and at < min(each.shared, each.prompt - 1)
            assert found == (MAX_ID if is_shared else own_id)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The second model runner's bookkeeping of three requests, with what the engine makes of it."""
    monkeypatch.setattr(LoraState, "remove_request", shared_part._removing(LoraState.remove_request))
    monkeypatch.setattr(LoraState, "get_activate_loras", shared_part._activating_on_gpu(LoraState.get_activate_loras))
    monkeypatch.setattr(LoraState, "make_lora_inputs", shared_part._mapping_on_gpu(LoraState.make_lora_inputs))
    runner = SimpleNamespace(
        lora_state=LoraState(4), req_states=SimpleNamespace(num_computed_tokens_np=np.zeros(4, np.int32))
    )

    def add_requests(runner: Any, output: Any) -> None:
        for index, new in enumerate(output.scheduled_new_reqs):
            runner.lora_state.remove_request(new.req_id)
            runner.lora_state.add_request(new.req_id, index, new.lora_request)

    loras = {"a": recipe(1), "b": None, "c": recipe(2)}
    new = [
        SimpleNamespace(req_id=name, lora_request=lora, sampling_params=asking(3), prompt_len=6)
        for name, lora in loras.items()
    ]
    shared_part._adding_on_gpu(add_requests, COMMONS)(runner, SimpleNamespace(scheduled_new_reqs=new))
    return runner


def test_a_gpus_runner_reads_them_alike(gpu: Any) -> None:
    rows = np.array([2, 0, 1])
    gpu.req_states.num_computed_tokens_np[:] = [2, 0, 0, 0]
    sampled, ids, active = gpu.lora_state.make_lora_inputs(ORDER, rows, np.array([4, 4, 2]))
    assert (sampled, ids) == ((2, 1, 0), (MAX_ID, MAX_ID, MAX_ID, 2, MAX_ID, 1, 1, 1, 0, 0))
    assert active == {recipe(1), recipe(2), COMMON}
    gpu.req_states.num_computed_tokens_np[:] = [6, 2, 4, 0]
    assert gpu.lora_state.make_lora_inputs(ORDER, rows, np.array([1, 1, 1]))[1] == (2, 1, 0)


def test_a_gpus_graphs_count_the_common_recipe(gpu: Any) -> None:
    config: Any = SimpleNamespace(max_loras=8)
    assert get_num_active_loras_for_dispatch(config, gpu.lora_state, ORDER, dummy_run=False) == 3
    assert get_num_active_loras_for_dispatch(config, gpu.lora_state, ["b"], dummy_run=False) == 0


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    lora: LoRARequest | None
    shared: int
    salt: str

    def hashes(self, block: int) -> list[bytes]:
        hasher = kv_cache_utils.get_request_block_hasher(block, sha256)
        of = {"lora_request": self.lora, "cache_salt": self.salt, "block_hasher": hasher}
        request = Request("r", list(self.ids), asking(self.shared), None, **of)
        request.append_output_token_ids([1] * block)
        return list(request.block_hashes)

    @property
    def common_tokens(self) -> int:
        """How many of its first tokens were read by all users' row."""
        if self.lora is None or self.lora.lora_name == OTHER_BANK:
            return 0
        return len(self.ids) + 10**6 if self.lora == COMMON else min(self.shared, len(self.ids) - 1)

    def common_blocks(self, end: int, block: int) -> int:
        """How many blocks before a token were read by all users' row."""
        return min(self.common_tokens, end) // block


LORAS = st.sampled_from([None, recipe(1), recipe(2), COMMON, recipe(9, OTHER_BANK)])
IDS = st.lists(st.integers(0, 1), min_size=1, max_size=24).map(tuple)
PROMPTS = st.builds(Prompt, IDS, LORAS, st.integers(0, 30), st.sampled_from(["one", "two"]))


@pytest.fixture(scope="module", autouse=True)
def hashed() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        kv_cache_utils.init_none_hash(sha256)
        original = kv_cache_utils.generate_block_hash_extra_keys
        patched.setattr(kv_cache_utils, "generate_block_hash_extra_keys", with_shared_blocks(original, COMMONS))
        yield


@given(PROMPTS, PROMPTS, st.sampled_from([1, 2, 4, 8]))
def test_a_block_is_found_by_those_alone_who_read_it_alike(one: Prompt, other: Prompt, block: int) -> None:
    """Same tenant, same tokens up to its end, and either the same recipe or the common one for all of these tokens."""
    mine, theirs = one.hashes(block), other.hashes(block)
    texts = [(*each.ids, *[1] * block) for each in (one, other)]
    for at in range(min(len(mine), len(theirs))):
        end = (at + 1) * block
        alike = one.salt == other.salt and texts[0][:end] == texts[1][:end]
        both_common = end <= min(one.common_tokens, other.common_tokens)
        same_reading = one.lora == other.lora and one.common_blocks(end, block) == other.common_blocks(end, block)
        assert (mine[at] == theirs[at]) == (alike and (both_common or same_reading))


def test_the_common_recipes_name_and_id_are_kept() -> None:
    names = AdapterNames({}, capacity=2, in_flight=set, next_id=MAX_ID)
    names.reserve(COMMON)
    for number in range(1, 13):
        name = recipe(number).lora_name
        assert names.lease(name).lora_int_id != MAX_ID
        names.release(name)
    assert names.lease(COMMON.lora_name) is COMMON
    names.release(COMMON.lora_name)
    assert (names.entries[COMMON.lora_name], names.leased) == (COMMON, 0)


USER = {"role": "user", "content": "hi"}


class Words:
    """A tokenizer with an id a word, under a template that names its tools."""

    def apply_chat_template(self, messages: list[dict[str, str]], tools: Sequence[Any] = (), **_: Any) -> str:
        said = " ".join(f"<{message['role']}> {message['content']}" for message in messages)
        return " ".join(["tools", *(tool["function"]["name"] for tool in tools), said])

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [hash(word) for word in text.split()]


@pytest.mark.parametrize(
    ("acts", "body", "count"),
    [
        (Acts.AFTER_SYSTEM, {"messages": [USER]}, 2),
        (
            Acts.AFTER_SYSTEM,
            {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "?"}]},
            5,
        ),
        (Acts.AFTER_SYSTEM, {"messages": [USER], "tools": ["clock", "map"]}, 4),
        (Acts.ANSWER, {"messages": [USER]}, shared_part.ALL),
        (Acts.AFTER_SYSTEM, {"prompt": "hi", "vllm_xargs": None}, 0),
        (Acts.ANSWER, {"prompt": [1, 2, 3]}, 99),
    ],
)
def test_a_request_says_how_much_of_its_prompt_is_shared(acts: Acts, body: dict[str, Any], count: int) -> None:
    tools = [
        SimpleNamespace(model_dump=lambda name=name: {"function": {"name": name}}) for name in body.pop("tools", [])
    ]
    made = {"vllm_xargs": {SHARED: 99, "mine": 1}, "tools": tools, "chat_template_kwargs": None}
    request = SimpleNamespace(**made | body)
    preparer: Any = SimpleNamespace(tokenizer=Words())
    Preparer.count_shared(preparer, request, SimpleNamespace(acts=acts))  # type: ignore[arg-type]
    assert request.vllm_xargs == {**((made | body)["vllm_xargs"] or {}), SHARED: count}
