"""Made the files beside it: a model, a bank, a data folder of `mta up` and a copy, as the version before this one does.

    cd CHECKOUT_OF_THE_VERSION_BEFORE && PYTHONPATH=$PWD python …/tests/earlier/make.py

It replaces them, so it belongs to a release: what they hold is then what the next version must open.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import redis

from bank.models.folders import ensure_embedder
from bench.rig.processes import wait_until
from bench.rig.tiny import tiny_bank, world
from bench.rig.up import up
from server.settings import Settings
from server.supervisor.services import valkey_url
from tests.support.architectures import tiny_of

HERE = Path(__file__).resolve().parent
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
SAMPLES = [{"input": f"question {n}", "output": f"{n} yes yes yes"} for n in range(8)]
FOR_EVER_MS = 4_102_444_800_000  # the year 2100: tombstones must still be there when a test looks


def mta(*arguments: object) -> str:
    command = [sys.executable, "-m", "server.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    for name in ("model", "bank", "data", "copy"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    model = tiny_of("llama", HERE / "model", tie_word_embeddings=True, **SHAPE)
    embedder = ensure_embedder(None, Settings().cache_dir)
    bank = tiny_bank(HERE / "bank", model, embedder, anchors=3, rank=2, user_rank=2, signs=True)
    with tempfile.TemporaryDirectory() as folder:
        made = use(Path(folder) / "data", "--bank", str(bank), "--model", str(model))
        for name in ("secret", "valkey/appendonlydir"):
            (HERE / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / "data" / name).rename(HERE / "data" / name)
    (HERE / "made.json").write_text(json.dumps(made, indent=2) + "\n", "utf-8")


def use(data: Path, *options: str) -> dict[str, str]:
    """Run a server, let it know people, erase some and copy its store; return what only its answers said."""
    with up(data, *options) as server, server.client() as client:
        for user, item in (("plain", SAMPLES[0]), ("adapted", {"text": world(1)}), ("erased", {"text": world(2)})):
            client.put(f"/users/{user}/profile", json={"items": [item]}).raise_for_status()
        config = {"steps": 6, "learning_rate": 0.05}
        asked = client.post("/users/adapted/adapt", json={"samples": SAMPLES, "config": config}).raise_for_status()
        job = asked.json()["id"]
        wait_until(lambda: client.get(f"/jobs/{job}").json()["state"] == "succeeded", "the job")
        wait_until(lambda: client.get("/users/plain").json()["source"] == "signature", "the signature")
        body = {"user_id": "plain", "prompt": "Any plans?", "max_tokens": 4}
        answer = client.post("/generate", json=body).raise_for_status().json()["id"]
        said = {"answer": answer, "rating": "up", "input": "Any plans?", "text": "None.", "final": "The sea, always."}
        client.post("/users/plain/feedback", json=said).raise_for_status()
        for user in ("erased", "nobody"):
            client.delete(f"/users/{user}")  # 404 of somebody unknown
        key = mta("keys", "create", "app", "--first", "--data", data)
        with redis.Redis.from_url(valkey_url(data) or "") as store:
            for name in store.scan_iter("mta:*:epoch"):
                store.pexpireat(name, FOR_EVER_MS)
        mta("backup", "--out", data / "copies", "--data", data)
        (copy,) = (data / "copies").iterdir()
        copy.rename(HERE / "copy")
    return {"job": job, "answer": answer, "key": key}


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1"}
    main()
