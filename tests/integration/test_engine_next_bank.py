"""A fleet moves from one bank to the next: one engine serves gateways of both at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx

from bank.manifest import read_manifest
from bench.rig.engine import running_engine
from bench.rig.tiny import tiny_bank, world
from server.settings import Settings
from tests.support.gateway import GatewayThread, generate, wait_until_ready

USERS = [f"mover-{number}" for number in range(4)]


def answering_bank(gateway: GatewayThread, user: str) -> str:
    """The bank that a user's answer was fused from."""
    with gateway.client() as client:
        answer = generate(client, user)
    told = answer.json()["personalization"]
    assert (answer.status_code, told["level"]) == (httpx.codes.OK, "merged"), answer.text
    return str(told["recipe"].split(":")[1])


def test_gateways_of_two_banks_of_other_modules_share_an_engine_under_load(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, gateway_settings: Settings
) -> None:
    """Of parts of packed modules among them, at different ranks, through fewer slots than there are users."""
    targets = ["v_proj", "o_proj", "gate_proj"]
    banks = [
        tiny_bank(tmp_path / "old", tiny_model_folder, embedder_folder, targets=["q_proj", "down_proj"], scale=0.2),
        tiny_bank(tmp_path / "new", tiny_model_folder, embedder_folder, anchors=5, rank=16, targets=targets, seed=2),
    ]
    both = [read_manifest(bank).short for bank in banks]
    redis_url = gateway_settings.redis_url
    with ExitStack() as stack:
        engine = stack.enter_context(
            running_engine(banks[0], tiny_model_folder, next_bank=banks[1], max_loras=2, redis_url=redis_url)
        )
        changes = {"engine_url": engine.url, "queue_places": 2 * len(USERS)}
        gateways = [
            stack.enter_context(GatewayThread(gateway_settings.model_copy(update=changes | {"bank": bank})))
            for bank in banks
        ]
        for gateway in gateways:
            with gateway.client() as client:
                wait_until_ready(client)
        with gateways[0].client() as client:
            for number, user in enumerate(USERS):
                client.put(f"/users/{user}/profile", json={"items": [{"text": world(number)}]}).raise_for_status()
        with ThreadPoolExecutor(2 * len(USERS)) as pool:
            turns = [(gateway, user) for _ in range(10) for user in USERS for gateway in gateways]
            answers = list(pool.map(lambda turn: answering_bank(*turn), turns))
        assert answers == both * (len(turns) // 2)
