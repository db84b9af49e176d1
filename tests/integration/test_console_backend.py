"""What the console gets from the gateway: its own small files, the bank on a map, and a user on it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from httpx import Client

from bank.items.tasks import get_task, tasks
from bank.manifest import PosteriorRule, WeightRule
from bench.rig.tiny import world
from server.gateway.routes.console import routes as pages
from server.gateway.routes.console.routes import TaskAnswer, rule_answer
from tests.support.calls import NewUser, error_of, put
from tests.support.gateway import GatewayThread

ROOT = Path(pages.__file__).parent
MOST_BYTES = 120_000
OWN = [path for path in sorted(pages.STATIC.rglob("*")) if path.is_file() and "vendor" not in path.parts]
MODULES = sorted(pages.STATIC.rglob("*.js"))
_IMPORT = re.compile(r"""(?:\bfrom\s?|\bimport\()['"]([^'"\s]+)['"]""")


@pytest.mark.parametrize("path", ["/console", "/console/", "/console/index.html"])
def test_the_page_may_load_nothing_but_its_own_files(client: Client, path: str) -> None:
    page = client.get(path).raise_for_status()
    assert page.text == (pages.STATIC / "index.html").read_text("utf-8")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = page.headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= set(policy)
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"


def test_a_file_has_its_type_and_is_not_sent_twice(client: Client) -> None:
    first = client.get("/console/app.js").raise_for_status()
    assert first.headers["Content-Type"] == "text/javascript; charset=utf-8"
    again = client.get("/console/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content, again.headers["Cache-Control"]) == (304, b"", "no-cache")
    assert "Content-Security-Policy" in again.headers


def test_the_api_reference_loads_files_of_this_server_alone(client: Client) -> None:
    page = client.get("/docs").raise_for_status().text
    files = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert {Path(file).suffix for file in files} == {".js", ".css", ".png"}
    assert all(file.startswith("/docs/files/") and client.get(file).is_success for file in files)
    assert error_of(client.get("/docs/files/no.js")) == (404, None, "not_found")


def test_the_servers_address_leads_to_the_console(client: Client) -> None:
    assert client.get("/").headers["Location"] == "/console"
    assert client.post("/console").status_code == 405


def test_the_bank_is_a_map_of_its_anchors(client: Client, gateway: GatewayThread, new_user: NewUser) -> None:
    told = client.get("/bank").raise_for_status().json()
    manifest = gateway.parts.bank.manifest
    assert (told["bank"], told["model"], told["method"]) == (manifest.short, "tiny", "shared")
    assert (told["rank"], told["serving_rank"], told["common_row"]) == (4, manifest.serving_rank, True)
    assert [(anchor["id"], anchor["items"]) for anchor in told["anchors"]] == [(f"a0{n}", 12) for n in range(6)]
    vectors = gateway.parts.bank.index.vectors(range(6)).astype(np.float64)
    places = np.array([anchor["at"] for anchor in told["anchors"]])
    variance = (vectors - vectors.mean(axis=0)).var(axis=0).sum()
    assert told["map"]["explained"] == pytest.approx(places.var(axis=0) / variance, abs=1e-4)
    assert (told["task"]["name"], told["task"]["instruction"], told["task"]["field"]) == ("chat", "", "input")
    assert told["rule"]["name"] == "topic"
    assert "2 anchors" in told["rule"]["says"]
    assert told["rule"]["constants"] == {"anchors": 2, "strength": 1.0}
    user_id = new_user()
    put(client, user_id, [{"text": world(3)}])
    assert client.get(f"/users/{user_id}").json()["at"] == pytest.approx(places[3], abs=1e-3)


@pytest.mark.parametrize("name", tasks())
def test_a_turn_is_what_the_task_says_and_one_field(name: str) -> None:
    task = get_task(name)
    told = TaskAnswer.of(task)
    assert task.input == told.instruction + (f"{{{told.field}}}" if told.field else "")


@pytest.mark.parametrize(
    ("rule", "directions", "name", "words"),
    [
        (WeightRule(anchors=3, strength=0.5), None, "topic", ["3 anchors", "in steps of 0.05", "sum to 0.5"]),
        (
            WeightRule(posterior=PosteriorRule(decay=130)),
            None,
            "posterior",
            ["each anchor's adapter", "about 130 tokens", "Until the items have been read, the 2"],
        ),
        (WeightRule(posterior=PosteriorRule()), 6, "posterior", ["along 6 mixtures of the anchors' adapters"]),
    ],
)
def test_a_rule_is_described_with_its_constants(
    gateway: GatewayThread, rule: WeightRule, directions: int | None, name: str, words: list[str]
) -> None:
    manifest = gateway.parts.bank.manifest.model_copy(update={"weights": rule, "directions": directions})
    told = rule_answer(manifest)
    assert told.name == name
    assert [word for word in words if word not in told.says] == []
    assert all(isinstance(number, int | float) for number in told.constants.values())


def test_console_files_are_small_and_vendored_hashes_match() -> None:
    assert sum(path.stat().st_size for path in pages.STATIC.rglob("*") if path.is_file()) < MOST_BYTES
    lines = (ROOT / "vendored.sha256").read_text("utf-8").splitlines()
    said = {name: digest for digest, name in (line.split() for line in lines)}
    files = {path for folder in ("static/vendor", "licences") for path in (ROOT / folder).iterdir()}
    assert said == {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_page_has_nothing_inline() -> None:
    page = (pages.STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\bstyle=|\bon\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.S) == [""]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_import_files_that_are_there(path: Path) -> None:
    for name in _IMPORT.findall(path.read_text("utf-8")):
        assert name.startswith("."), name
        assert (path.parent / name).is_file(), name


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_file_names_anybody_else_or_writes_markup(path: Path) -> None:
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "://" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
