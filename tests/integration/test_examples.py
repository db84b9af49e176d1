"""The examples do what they say, each over a real gateway."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bench.rig.people import people
from mta_client import Client
from tests.support.documented import ROOT
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread
from tests.support.node import run_module

EXAMPLES = ROOT / "examples"
LONGEST = 80  # lines
ASK = """
import { POST } from './ai_sdk_route.mjs'
const messages = [{ role: 'user', content: 'any plans?' }]
const headers = { 'X-Signed-In': process.env.USER_ID }
const response = await POST(new Request('http://app', { method: 'POST', headers, body: JSON.stringify({ messages }) }))
console.log(await response.text())
"""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rosa(gateway: GatewayThread, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user of the gateway, which the examples find by `MTA_URL`."""
    monkeypatch.setenv("MTA_URL", gateway.url)
    with Client(gateway.url) as client:
        client.put_profile("rosa", ["The first roses are open along the south wall."])
    return "rosa"


def asked_by(fake_engine: FakeEngine) -> list[Any]:
    """Return the last turn of each request with an adapter of a bank's."""
    return [seen.body["messages"][-1]["content"] for seen in fake_engine.seen if seen.body["model"].startswith("mta3:")]


def test_each_is_short_and_listed() -> None:
    files = [path for path in EXAMPLES.iterdir() if path.name != "__pycache__"]
    listed = (ROOT / "docs" / "adopting" / "quickstart.md").read_text(encoding="utf-8")
    for file in files:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST or file.suffix == ".ipynb"
        assert f"examples/{file.name}" in listed


def test_a_fastapi_app_suggests_and_learns(rosa: str, fake_engine: FakeEngine) -> None:
    with TestClient(example("fastapi_app").app, headers={"X-Signed-In": rosa}) as app:
        assert app.post("/texts", json=["Sowed beans by the gate."]).json() == {"items": 2}
        made = app.post("/suggestions", params={"message": "any plans?"}).json()
        assert made["level"] == "merged"
        reply = {"answer_id": made["answer_id"], "message": "any plans?", "suggested": made["text"]}
        assert app.post("/sent", json=reply | {"text": "The garden."}).json() == {"outcome": "edited"}
    assert asked_by(fake_engine) == ["any plans?"]


def test_a_langchain_chain_is_its_users(rosa: str, gateway: GatewayThread, fake_engine: FakeEngine) -> None:
    chain = example("langchain_chain").chain_for(rosa, gateway.url)
    whole = chain.invoke({"what": "a picnic"})
    assert whole and "".join(chain.stream({"what": "a picnic"})) == whole
    assert asked_by(fake_engine) == ["Invite a friend to a picnic."] * 2


def test_a_route_of_the_ai_sdk_streams(
    rosa: str, gateway: GatewayThread, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLES / "ai_sdk_route.mjs", tmp_path)
    (tmp_path / "ask.mjs").write_text(ASK)
    done = run_module(tmp_path, "ask.mjs", environment={"MTA_URL": gateway.url, "USER_ID": rosa})
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert asked_by(fake_engine) == ["any plans?"]


def test_a_mail_assistant_rewrites(
    rewriting: GatewayThread, fake_engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(rewriting.url) as client:
        client.put_profile("rosa", ["The first roses are open along the south wall."])
        text = example("mail_assistant").written_by(client, "rosa", "We meet on 12 May.")
    assert text
    assert capsys.readouterr().err == "lost, please look: 12\n"
    assert "We meet on 12 May." in asked_by(fake_engine)[0]


def test_a_notebook_compares_voices(
    gateway: GatewayThread, fake_engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTA_URL", gateway.url)
    monkeypatch.setenv("PEOPLE", str(tmp_path / "people.json"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "people.json").write_text(json.dumps(people(2)))
    cells = json.loads((EXAMPLES / "evaluation.ipynb").read_text(encoding="utf-8"))["cells"]
    told: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), told)
    assert set(told["voices"]) == {"secret-person-0", "secret-person-1"}
    assert len(asked_by(fake_engine)) == 4
