"""What happens when parts die or are not what they should be: real processes, killed the hard way."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from bank.manifest import INDEX_FILE, MATRIX_FILE
from bench.rig.processes import alive, children, command_line, descendants, listening, mta, running, wait_until
from bench.rig.up import Up, up
from tests.support.fake_engine import KEY

PROFILE = {"items": [{"text": "The swell was perfect at dawn, so we surfed until noon."}]}
CONTEXT = 16_384
LONG = {"user_id": "ada", "prompt": "Hello", "max_tokens": CONTEXT - 100, "temperature": 0, "stream": True}
SHORT = {"user_id": "ada", "prompt": "Hello", "max_tokens": 2}
WRITES = 500


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, embedder_folder: Path) -> Iterator[Up]:
    """`mta up` with all three parts real, on a tiny model that can go on for long. Tests leave it ready."""
    from bench.rig.tiny import tiny_bank, tiny_model

    folder = tmp_path_factory.mktemp("machine")
    model = tiny_model(folder / "model", context=CONTEXT)
    bank = tiny_bank(folder / "bank", model, embedder_folder, anchors=6)
    options = ("--bank", str(bank), "--model", str(model), "--dtype", "float32")
    with up(folder / "data", *options, environment={"MTA_EMBEDDER": str(embedder_folder)}) as started:
        with started.client() as client:
            client.put("/users/ada/profile", json=PROFILE).raise_for_status()
        yield started


def _server(machine: Up) -> int:
    pid = machine.part("engine")
    assert pid
    return pid


def _core(machine: Up) -> int:
    return next(pid for pid in children(_server(machine)) if "EngineCore" in command_line(pid))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [_server, _core])
def test_an_engine_killed_in_mid_stream_comes_back(machine: Up, victim: Callable[[Up], int]) -> None:
    gateway, restarts = machine.part("gateway"), machine.process.output.count("engine   ready")
    family, doomed = descendants(_server(machine)), victim(machine)
    with machine.client() as client:
        with client.stream("POST", "/generate", json=LONG) as response:
            lines = response.iter_lines()
            assert "personalization" in next(lines)
            os.kill(doomed, signal.SIGKILL)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert "[DONE]" not in events
        assert "error" in json.loads(events[-1])
        wait_until(lambda: client.get("/ready").status_code == 503, "/ready to turn 503")
        refused = client.post("/generate", json=SHORT)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "service_unavailable"
        wait_until(lambda: machine.process.output.count("engine   ready") > restarts, "the engine's restart", 240)
        wait_until(machine.ready, "/ready to turn 200")
        answer = client.post("/generate", json=SHORT)
        assert answer.status_code == 200, answer.text
        assert answer.json()["personalization"]["level"] == "merged"
    assert machine.part("gateway") == gateway
    assert [pid for pid in family if alive(pid)] == []


@pytest.mark.timeout(600)
def test_500_acknowledged_profiles_outlive_a_killed_valkey(machine: Up) -> None:
    assert _fsync(machine) == ("always", "yes")
    with machine.client() as client, ThreadPoolExecutor(8) as threads:
        users = [f"user-{number}" for number in range(WRITES)]
        answers = threads.map(lambda user: client.put(f"/users/{user}/profile", json=PROFILE), users)
        assert {answer.status_code for answer in answers} == {200}
        pid, restarts = machine.part("valkey"), machine.process.output.count("valkey   ready")
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: machine.process.output.count("valkey   ready") > restarts, "Valkey to be back")
        wait_until(machine.ready, "/ready to turn 200")
        assert machine.part("valkey") not in (None, pid)
        stored = threads.map(lambda user: client.get(f"/users/{user}"), users)
        assert sum(answer.status_code == 200 for answer in stored) == WRITES
    assert _fsync(machine) == ("always", "yes")


def _fsync(machine: Up) -> tuple[str, str]:
    """How the store writes, asked with the password that only the owner of the data folder can read."""
    options = dict(line.split(" ", 1) for line in (machine.data / "valkey.conf").read_text().splitlines())
    with redis.Redis(port=int(options["port"]), password=options["requirepass"], decode_responses=True) as store:
        return store.config_get("appendfsync")["appendfsync"], store.config_get("appendonly")["appendonly"]


def test_every_socket_of_every_part_is_on_the_loopback_address(machine: Up) -> None:
    found = {socket for pid in descendants(machine.pid) for socket in listening(pid)}
    assert len(found) >= 3
    assert {address for address, _ in found} == {"127.0.0.1"}


def test_the_engine_cannot_be_used_without_its_key(machine: Up) -> None:
    for address, port in listening(_server(machine)):
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/mta/v1/status")):
            assert httpx.request(method, f"http://{address}:{port}{path}", json={}).status_code == 401


def test_no_orphans(machine: Up) -> None:
    family = descendants(machine.pid)
    assert any("EngineCore" in command_line(pid) for pid in family)
    machine.process.send(signal.SIGKILL)  # in the machine's last test
    machine.process.wait()
    wait_until(lambda: not any(alive(pid) for pid in family), "every process to be gone")


@dataclass(frozen=True)
class Copies:
    """A bank, a model and an embedder to be damaged at will."""

    bank: Path
    model: Path
    embedder: Path

    def flip(self, file: str) -> None:
        content = bytearray((self.bank / file).read_bytes())
        content[len(content) // 2] ^= 1
        (self.bank / file).write_bytes(content)

    def rename_an_anchor(self) -> None:
        manifest = self.bank / "bank.json"
        manifest.write_text(manifest.read_text().replace('"a00"', '"a01"', 1))

    def change_the_model(self) -> None:
        from bench.rig.tiny import tiny_model

        shutil.rmtree(self.model)
        tiny_model(self.model, seed=1)

    def change_the_embedder(self) -> None:
        import onnx

        graph = onnx.load(self.embedder / "model.onnx")
        graph.doc_string = "another"
        onnx.save(graph, self.embedder / "model.onnx")


@pytest.fixture
def copies(tmp_path: Path, tiny_bank_folder: Path, tiny_model_folder: Path, embedder_folder: Path) -> Copies:
    originals = {"bank": tiny_bank_folder, "model": tiny_model_folder, "embedder": embedder_folder}
    return Copies(*(Path(shutil.copytree(original, tmp_path / name)) for name, original in originals.items()))


# What is broken, what the one line of explanation holds, and the commands that must find it at start.
FAULTS: dict[str, tuple[Callable[[Copies], None], str, str]] = {
    "matrix": (lambda copies: copies.flip(MATRIX_FILE), "meta_loras.safetensors is damaged", "engine up"),
    "index": (lambda copies: copies.flip(INDEX_FILE), "anchors.faiss is damaged", "gateway up"),
    "manifest": (Copies.rename_an_anchor, "does not match its fingerprint", "engine"),
    "model": (Copies.change_the_model, "serve the bank's model, or build a bank for this one", "engine up"),
    "no embedder": (lambda copies: shutil.rmtree(copies.embedder), "no embedder at", "gateway up"),
    "embedder": (Copies.change_the_embedder, "was made with embedder", "gateway up"),
    "no bank": (lambda copies: shutil.rmtree(copies.bank), "no bank at", "engine gateway up"),
}


@pytest.mark.parametrize(
    ("name", "command"), [(name, command) for name, (_, _, found_by) in FAULTS.items() for command in found_by.split()]
)
def test_a_fault_is_refused_at_start_with_the_reason(name: str, command: str, copies: Copies, tmp_path: Path) -> None:
    fault, reason, _ = FAULTS[name]
    fault(copies)
    folders = {"BANK": copies.bank, "MODEL": copies.model, "EMBEDDER": copies.embedder, "DATA_DIR": tmp_path / "data"}
    environment = {f"MTA_{name}": str(folder) for name, folder in folders.items()}
    environment |= {"MTA_PORT": "0", "MTA_SECRET": "s" * 32, "MTA_ENGINE_KEY": KEY}
    with running(mta(command), environment) as process:
        assert process.wait() == 1, process.output
        assert reason in process.output
        assert "Traceback" not in process.output
        assert "starting" not in process.output
