"""The TypeScript client: against a real gateway, by the compiler, and as a package."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread
from tests.support.node import names_of, run_module, run_tests

CLIENT = Path(__file__).parents[2] / "mta_client" / "typescript"
MODULE = Path(__file__).with_name("typescript_client.mjs")
TOOLS = "node_modules"
APP = """
import { Client, MtaError, type Answer } from '#mta-client'
const client = new Client('http://localhost:8000', { key: 'x' })
const answer: Answer = await client.generate('rosa', 'hi', { max_tokens: 4, strength: 0.5 })
for await (const chunk of client.stream('rosa', [{ role: 'user', content: 'hi' }]))
  console.log(chunk.choices[0]?.delta.content, answer.personalization.level)
const job = await client.wait((await client.adapt('rosa', ['a text'], { append: true })).id)
const gone = await client.forget('rosa', { missingOk: true })
if (gone !== null) console.log(gone.erased, job.state, MtaError)
const made = await client.rewrite('rosa', 'a draft', { on_loss: 'retry' })
console.log(made.kept['numbers'], made.missing.length)
// @ts-expect-error
await client.generate('rosa', 'hi', { max_tokens: 'many' })
// @ts-expect-error
await client.feedback('rosa', answer.id, { rating: 'so-so' })
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, gateway: GatewayThread) -> Path:
    """An app that has the client and the server's OpenAPI document."""
    folder = tmp_path_factory.mktemp("typescript")
    shutil.copytree(CLIENT, folder / "client")
    (folder / "client" / "openapi.json").write_text(json.dumps(gateway.app.openapi()))
    (folder / "package.json").write_text('{"type": "module", "imports": {"#mta-client": "./client/index.js"}}')
    (folder / "app.ts").write_text(APP)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, gateway: GatewayThread, fake_engine_server: FakeEngine) -> Mapping[str, str]:
    fake_engine_server.reset()
    return run_tests(folder, MODULE, {"GATEWAY_URL": gateway.url, "USER": "typescript"})


@pytest.mark.parametrize("name", names_of(MODULE))
def test_it_calls_the_server(results: Mapping[str, str], name: str) -> None:
    assert results[name] == "ok", results[name]


def test_its_types_are_the_servers(folder: Path) -> None:
    document, types = "client/openapi.json", "client/api.d.ts"
    tool = f"{TOOLS}/openapi-typescript/bin/cli.js"
    done = run_module(folder, tool, arguments=[document, "--output", types], environment={})
    assert done.returncode == 0, done.stderr
    options = ["--noEmit", "--strict", "--module", "nodenext", "--target", "es2022", "--lib", "es2023,dom", "app.ts"]
    done = run_module(folder, f"{TOOLS}/typescript/bin/tsc", arguments=options, environment={})
    assert done.returncode == 0, done.stdout


def test_every_method_of_pythons_client_is_there() -> None:
    from mta_client import Client

    methods = {name for name in vars(Client) if not name.startswith("_")} - {"stop"}
    words = {re.sub(r"_(\w)", lambda found: found[1].upper(), name) for name in methods}
    declared = (CLIENT / "index.d.ts").read_text(encoding="utf-8")
    assert words == set(re.findall(r"^  (\w+)\(", declared, re.MULTILINE)) - {"constructor"}
