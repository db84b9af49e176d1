"""What `mta verify` does: read texts with an engine and with the trainer's forward pass, and compare."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import typer

from adapters.errors import MtaError, excerpt
from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.recipe import parse_recipe
from adapters.training.example import Example
from adapters.user_adapter import decode_user_adapter, stack
from bank.agreement import agreements, bound_of
from bank.building.readings import TEXTS, readings, trial_recipes
from bank.items.profile import Vectors, item_pair, item_text, parse_item
from bank.items.prompt import encode_pair
from bank.items.tasks import get_task
from bank.manifest import BankManifest, read_manifest
from bank.matrix import open_matrix, shared_part
from bank.models.folders import check_base_model, ensure_base_model
from bank.models.load import load_base, resolve_dtype
from server.cli.users.commands import call_gateway
from server.engine_protocol import SHARED, STATUS, key_header
from server.settings import Settings
from server.store.tenants.user_key import UserKeys
from server.supervisor.services import with_engines

MAX_ITEMS, MAX_TOKENS = 8, 512  # newest items of a user; tokens of a text
TIMEOUT_S = 600


def verified(settings: Settings, user: str | None, texts: Path | None, url: str | None) -> bool:
    """Print a line for each engine, text and recipe; return whether all are within the bound."""
    settings = with_engines(settings)
    folder = settings.bank_folder()
    manifest = read_manifest(folder)
    headers = key_header(next(iter(settings.engine_keys), None))
    engines = [
        httpx.Client(base_url=at, headers=headers, timeout=TIMEOUT_S, trust_env=False) for at in settings.engines
    ]
    states = [_call(engine, STATUS) for engine in engines]
    if any(manifest.fingerprint not in state["banks"] for state in states):
        raise MtaError(f"an engine does not serve the bank at {folder}: set --bank to one that all of them do")
    dtypes = [state.get("dtype") for state in states]
    dtype = "float32" if {*dtypes} == {"float32"} else resolve_dtype("auto")
    model_folder = ensure_base_model(settings.model, settings.cache_dir, manifest.base_model, settings.chat_template)
    check_base_model(model_folder, {folder: manifest})
    matrix, pairs = open_matrix(folder, manifest), list(TEXTS)
    adapters = {recipe.name: fuse(matrix, recipe, torch.float32) for recipe in trial_recipes(manifest)}
    if user is not None:
        pairs, own = _of_user(settings, manifest, matrix, user, url)
        adapters |= own
    if texts is not None:
        pairs = [(TEXTS[0][0], line) for line in texts.read_text("utf-8").splitlines() if line.strip()]
    if not pairs:
        raise MtaError(f"there is nothing to read: {'the user has no items' if texts is None else f'{texts} is empty'}")
    model, tokenizer = load_base(model_folder, dtype)
    examples = [encode_pair(tokenizer, *pair, MAX_TOKENS) for pair in pairs]
    trained, within = readings(model, examples, adapters, shared_part(matrix, manifest)), True
    for engine, served_dtype in zip(engines, dtypes, strict=True):
        bound = bound_of({dtype, served_dtype})
        typer.echo(f"the engine at {engine.base_url} in {served_dtype}, training in {dtype}: {bound}")
        served = [_ask(engine, example, trained[0], example.personal_from(manifest.acts)) for example in examples]
        for text, pair in enumerate(zip(_with_all(served), _with_all(trained), strict=True), 1):
            for name, agreement in agreements(*pair, bound).items():
                within = within and agreement.within
                shown = f"text {text}" if text <= len(examples) else "all texts"
                typer.echo(f"{shown}, {name.split(':', 3)[-1][:40]}: {agreement}")
    return within


def _of_user(
    settings: Settings, manifest: BankManifest, matrix: MetaMatrix, user_id: str, url: str | None
) -> tuple[list[tuple[str, str]], dict[str, LoraWeights]]:
    """Return a user's newest items as turns and outputs, and their recipe and adapter by name, as the gateway knows."""
    user, export = call_gateway(url, lambda client: (client.user(user_id), client.export(user_id)))
    adapter = export["adapter"] if user.adapter and not user.adapter["stale"] else None
    recipe = parse_recipe(adapter["recipe"] if adapter else user.recipe)
    manifest.check(recipe)
    adapters = {recipe.name: fuse(matrix, recipe, torch.float32)}
    if adapter:
        key = UserKeys(settings.user_secret, settings.tenant).key(user_id)
        own = decode_user_adapter(manifest.layout, base64.b64decode(adapter["stored"]))
        adapters[f"{recipe.name}:u-{key}.{adapter['id']}"] = stack(adapters[recipe.name], own, torch.float32)
    task = get_task(manifest.task)
    items = [parse_item(raw, task, position) for position, raw in enumerate(export["items"][-MAX_ITEMS:])]
    return [item_pair(item, task) or (TEXTS[0][0], item_text(item, task)) for item in items], adapters


def _ask(engine: httpx.Client, example: Example, names: Iterable[str], shared: int) -> dict[str, Vectors]:
    """Return the log-probabilities of an example's output tokens by recipe, as an engine reads it."""
    by_adapter, tokens = {}, list(enumerate(example.ids))[example.loss_from :]
    options = {"prompt": example.ids, "max_tokens": 1, "prompt_logprobs": 0, "vllm_xargs": {SHARED: shared}}
    for name in names:
        read = _call(engine, "/v1/completions", {"model": name} | options)["choices"][0]["prompt_logprobs"]
        by_adapter[name] = np.array([read[position][str(token)]["logprob"] for position, token in tokens])
    return by_adapter


def _call(engine: httpx.Client, path: str, body: object = None) -> Any:
    try:
        answer = engine.request("POST" if body else "GET", path, json=body)
        if answer.is_success:
            return answer.json()
        problem = f"{answer.status_code} {excerpt(answer.text)}"
    except httpx.HTTPError as error:
        problem = str(error)
    raise MtaError(f"the engine at {engine.base_url} gives no {path}: {problem}; set --engine-url and MTA_ENGINE_KEY")


def _with_all(texts: list[dict[str, Vectors]]) -> list[dict[str, Vectors]]:
    return [*texts, {name: np.concatenate([text[name] for text in texts]) for name in texts[0]}]
