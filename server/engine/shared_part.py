"""One reading for everybody: the shared part of a prompt is read with its bank's common row, once for all users.

The API process counts a request's shared tokens (`admission/prepare.py`) and sends the count along. The engine core
hashes blocks wholly within them under the common recipe's name, so the prefix cache finds them for every user of a
tenant. In a step, the model's runner gives these tokens to the slot of the common recipe, which takes part in every
step with adapters; so an engine has one slot for each bank besides those that the scheduler knows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.lora.request import LoRARequest

from adapters.recipe import is_recipe_name
from bank.manifest import BankManifest, read_manifest
from server.engine import patches
from server.engine_protocol import SHARED
from server.settings import Settings

ALL = 1 << 30  # all of a prompt but its last token, which predicts the answer's first
MAX_ID = 2**31 - 1  # vLLM's kernels index adapters by int32


@dataclass(frozen=True)
class CommonRecipes:
    """The common recipes of the banks whose prompts have a shared part, with ids that no other recipe gets."""

    by_bank: Mapping[str, LoRARequest]

    @classmethod
    def of(cls, manifests: Iterable[BankManifest]) -> CommonRecipes:
        sharing = sorted((m for m in manifests if m.shares_prompts), key=lambda m: m.short)
        names = {manifest.short: manifest.common_recipe.name for manifest in sharing}
        return cls({bank: _request(name, MAX_ID - at) for at, (bank, name) in enumerate(names.items())})

    @classmethod
    def served(cls) -> CommonRecipes:
        return cls.of(map(read_manifest, Settings().banks))

    def beside(self, request: LoRARequest | None) -> LoRARequest | None:
        """Return the common recipe of a recipe's bank; None if nothing is shared."""
        if request is None or not is_recipe_name(request.lora_name):
            return None
        return self.by_bank.get(request.lora_name.split(":", 2)[1])

    def __len__(self) -> int:
        return len(self.by_bank)


def _request(name: str, lora_id: int) -> LoRARequest:
    return LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=name)


def shared_tokens(sampling_params: Any, prompt_tokens: int) -> int:
    """Return the number of a request's first tokens that are shared; never its prompt's last one."""
    arguments = getattr(sampling_params, "extra_args", None) or {}
    return max(0, min(int(arguments.get(SHARED, 0)), prompt_tokens - 1))


class SharedReading:
    """Which requests of a runner's batch are still in their shared part."""

    def __init__(self, commons: CommonRecipes) -> None:
        self._commons = commons
        self._left: dict[str, tuple[int, int]] = {}  # number of shared tokens, and the common recipe's id, by request

    def add(self, request_id: str, lora: LoRARequest | None, sampling_params: Any, prompt_tokens: int) -> None:
        self.remove(request_id)
        common, count = self._commons.beside(lora), shared_tokens(sampling_params, prompt_tokens)
        if common and count:
            self._left[request_id] = count, common.lora_int_id

    def remove(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def mapped(
        self, ids: tuple[int, ...], rows: Mapping[str, int], computed: Sequence[int], scheduled: Sequence[int]
    ) -> tuple[int, ...]:
        """Return the adapters' ids of a step's tokens with the common recipe's for those that are shared.

        `rows` are the step's requests in the order of its tokens; `computed` and `scheduled` are tokens, by row.
        """
        if not self._left:
            return ids
        owners, ends = list(ids), np.cumsum(scheduled)
        for request_id, (count, common) in list(self._left.items()):
            if (row := rows.get(request_id)) is None:
                continue
            shared = min(count - int(computed[row]), int(scheduled[row]))
            if shared <= 0:
                del self._left[request_id]
                continue
            begin = int(ends[row] - scheduled[row])
            owners[begin : begin + shared] = [common] * shared
        return tuple(owners)

    def beside(self, active: set[LoRARequest]) -> set[LoRARequest]:
        """Return a step's adapters with the common recipes, which keep their slots so."""
        return active.union(self._commons.by_bank.values()) if active else active


def install(commons: CommonRecipes, *, on_cpu: bool) -> None:
    """Make this process hash and read shared parts under the common recipes; GPUs may use either model runner."""
    patches.check(patches.SHARING)
    if not on_cpu:
        patches.check(patches.SHARING_ON_GPU)
    patches.replace(patches.BLOCK_KEYS, lambda original: with_shared_blocks(original, commons))
    patches.replace(patches.BATCH_ADD, lambda original: _adding(original, commons))
    patches.replace(patches.BATCH_REMOVE, _removing)
    patches.replace(patches.BATCH_LORAS, _mapping)
    if not on_cpu:
        patches.replace(patches.GPU_ADD, lambda original: _adding_on_gpu(original, commons))
        patches.replace(patches.GPU_REMOVE, _removing)
        patches.replace(patches.GPU_ACTIVE, _activating_on_gpu)
        patches.replace(patches.GPU_LORAS, _mapping_on_gpu)


def with_shared_blocks(original: Callable[..., Any], commons: CommonRecipes) -> Callable[..., Any]:
    def block_keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        common = commons.beside(request.lora_request)
        if common and end_token_idx <= shared_tokens(request.sampling_params, request.num_prompt_tokens):
            own, shared = (("lora", lora.lora_name, lora.lora_path) for lora in (request.lora_request, common))
            keys = tuple(shared if key == own else key for key in keys)
        return keys, next_mm_idx

    return block_keys


def _adding(original: Callable[..., Any], commons: CommonRecipes) -> Callable[..., Any]:
    def add_request(batch: Any, request: Any) -> Any:
        reading = batch.__dict__.setdefault(SHARED, SharedReading(commons))
        reading.add(request.req_id, request.lora_request, request.sampling_params, request.num_prompt_tokens)
        return original(batch, request)

    return add_request


def _removing(original: Callable[..., Any]) -> Callable[..., Any]:
    def remove_request(batch: Any, req_id: str) -> Any:
        if reading := batch.__dict__.get(SHARED):
            reading.remove(req_id)
        return original(batch, req_id)

    return remove_request


def _mapping(original: Callable[..., Any]) -> Callable[..., Any]:
    def make_lora_inputs(batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
        sampled, ids, active = original(batch, num_scheduled_tokens, num_sampled_tokens)
        if reading := batch.__dict__.get(SHARED):
            ids = reading.mapped(ids, batch.req_id_to_index, batch.num_computed_tokens_cpu, num_scheduled_tokens)
            active = reading.beside(active)
        return sampled, ids, active

    return make_lora_inputs


def _adding_on_gpu(original: Callable[..., Any], commons: CommonRecipes) -> Callable[..., Any]:
    def add_requests(runner: Any, scheduler_output: Any) -> Any:
        added = original(runner, scheduler_output)  # which removes what it had of them
        state = runner.lora_state
        state.mta_computed = runner.req_states.num_computed_tokens_np
        reading = state.__dict__.setdefault(SHARED, SharedReading(commons))
        for new in scheduler_output.scheduled_new_reqs:
            reading.add(new.req_id, new.lora_request, new.sampling_params, new.prompt_len)
        return added

    return add_requests


def _activating_on_gpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """Count the common recipes too: the graph that is replayed must have launched the kernels for all of a step."""

    def get_activate_loras(state: Any, req_ids: Sequence[str]) -> Any:
        active, reading = original(state, req_ids), state.__dict__.get(SHARED)
        return reading.beside(active) if reading else active

    return get_activate_loras


def _mapping_on_gpu(original: Callable[..., Any]) -> Callable[..., Any]:
    def make_lora_inputs(state: Any, req_ids: Sequence[str], idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        sampled, ids, active = original(state, req_ids, idx_mapping, num_scheduled_tokens)
        if reading := state.__dict__.get(SHARED):
            rows = {request_id: row for row, request_id in enumerate(req_ids)}
            ids = reading.mapped(ids, rows, state.mta_computed[idx_mapping], num_scheduled_tokens)
        return sampled, ids, active

    return make_lora_inputs


def without_common_slots(lora_config: Any) -> Any:
    """Return vLLM's configuration as the scheduler may know it: the common recipes' slots are not its to give."""
    known = copy.copy(lora_config)
    known.max_loras -= len(CommonRecipes.served())
    return known
