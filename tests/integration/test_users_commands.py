"""`mta users`: people from a file into a gateway, and what it keeps of one of them, shown, exported and erased."""

from __future__ import annotations

import json
import stat
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

import mta_client
from adapters.errors import MtaError
from bench.rig.processes import wait_until
from bench.rig.valkey import free_port
from server.cli import app
from server.cli.users.gateway import RequestRefused, gateway_errors
from server.cli.users.importing import Journal, import_people
from tests.support.gateway import GatewayThread

NewUser = Callable[[], str]
PROFILE = {"user_id": "ada", "received": 1, "kept": 1, "changed": 1, "recipe": "r", "anchors": []}
STRANGE = "a?b#c%41&<img>=é..;"


def mta(*arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["users", *arguments], input=typed)


def refusal(*arguments: str) -> str:
    failed = mta(*arguments).exception
    assert isinstance(failed, MtaError)
    return str(failed)


def written(path: Path, people: dict[str, list[Any]], layout: str = "lines") -> Path:
    entries = [{"user_id": user, "profile": profile, "query": []} for user, profile in people.items()]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    path.write_text(lines if layout == "lines" else json.dumps(entries, indent=1))
    return path


@pytest.fixture
def profiles(new_user: NewUser) -> dict[str, list[Any]]:
    return {user: [f"I am {user}", {"id": "it", "text": "and more"}] for user in (new_user() for _ in range(10))}


@pytest.mark.parametrize("layout", ["lines", "list"])
def test_second_import_stores_only_the_users_that_changed(
    client: httpx.Client, gateway: GatewayThread, tmp_path: Path, profiles: dict[str, list[Any]], layout: str
) -> None:
    def last_line() -> str:
        done = mta("import", str(path), "--url", gateway.url)
        assert done.exit_code == 0
        return done.output.splitlines()[-1]

    path, ids = written(tmp_path / "people", profiles, layout), list(profiles)
    assert last_line() == "10 imported, 0 already imported, 0 failed"
    assert [client.get(f"/users/{user}").json()["items"] for user in ids] == [2] * 10
    state = path.with_name("people.imported")
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert not any(user in state.read_text() for user in ids)
    client.delete(f"/users/{ids[0]}").raise_for_status()
    profiles[ids[3]][0] = "I have changed"
    written(path, profiles, layout)
    with state.open("a") as file:
        file.write("abc")  # killed while it wrote
    assert last_line() == "1 imported, 9 already imported, 0 failed"
    assert client.get(f"/users/{ids[3]}/export").json()["items"][0]["text"] == "I have changed"
    assert client.get(f"/users/{ids[0]}").status_code == 404  # whoever was erased stays so
    assert last_line() == "0 imported, 10 already imported, 0 failed"
    profiles[ids[3]][0] = f"I am {ids[3]}"  # as at first
    written(path, profiles, layout)
    assert last_line() == "1 imported, 9 already imported, 0 failed"


def test_failed_imports_are_named_and_the_rest_go_on(
    client: httpx.Client, gateway: GatewayThread, new_user: NewUser, tmp_path: Path
) -> None:
    good, late = new_user(), new_user()
    entries: list[Any] = [
        {"user_id": good, "profile": ["fine"]},
        {"user_id": good, "profile": ["twice"]},
        {"user_id": "no good", "profile": ["x"]},
        {"user_id": "..", "profile": ["x"]},
        {"profile": ["x"]},
        {"user_id": new_user()},
        {"user_id": new_user(), "profile": [{"nothing": "that the task knows"}]},
        ["a", "list"],
        {"user_id": 17, "items": ["numbers are ids too"]},
        {"id": late, "profile": ["fine"]},
        {"id": "Zo\u00eb", "profile": ["fine"]},
        {"id": "Zoe\u0308", "profile": ["the same to the server"]},
    ]
    path = tmp_path / "people.ndjson"
    path.write_text("no json\n\n" + "".join(json.dumps(entry) + "\n" for entry in entries))
    done = mta("import", str(path), "--url", gateway.url, "--state", str(tmp_path / "far" / "state"))
    assert done.exit_code == 1
    failures = map(json.loads, (tmp_path / "far" / "people.ndjson.failed.ndjson").read_text().splitlines())
    assert done.output.splitlines()[-1].startswith("4 imported, 0 already imported, 9 failed: see ")
    reasons = {failure["entry"]: failure["reason"] for failure in failures}
    expected = {1: "not JSON", 4: "twice", 5: "without spaces", 6: "must not be . or ..", 7: "no user_id"}
    expected |= {8: "no profile", 9: "items.0", 10: "must be an object", 14: "twice"}
    assert all(reason in reasons[place] for place, reason in expected.items()), reasons
    assert [client.get(f"/users/{user}").status_code for user in (good, "17", late)] == [200] * 3


def test_people_in_a_folder_are_imported_with_their_mails(
    client: httpx.Client, gateway: GatewayThread, new_user: NewUser, tmp_path: Path
) -> None:
    user, nobody, folder = new_user(), new_user(), tmp_path / "people"
    (folder / user).mkdir(parents=True)
    mail = "From: a@x.org\nSubject: Boats\n\nThe sea was flat all week long, they say.\n"
    (folder / user / "1.eml").write_text(mail)
    (folder / user / "photo.png").write_bytes(b"")
    (folder / nobody).mkdir()
    done = mta("import", str(folder), "--url", gateway.url)
    left_out, summary = done.output.splitlines()[-2:]
    assert done.exit_code == 1 and summary.startswith("1 imported, 0 already imported, 1 failed")
    assert left_out.startswith("2 files, mails or lines are left out")
    (item,) = client.get(f"/users/{user}/export").json()["items"]
    assert item["input"] == 'Write a mail about "Boats".' and item["output"].startswith("The sea was flat")
    assert nobody in (tmp_path / "people.failed.ndjson").read_text()


class Stub:
    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []  # status and headers of the next ones; then 200
        self.served: list[str] = []  # the users who got a 200, in order
        self.most = self._now = 0  # requests at a time
        self.client = mta_client.Client("http://stub", retry_s=60, transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self._now += 1
        self.most = max(self.most, self._now)
        time.sleep(0.001)
        self._now -= 1
        status, headers = self.answers.pop(0) if self.answers else (200, {})
        if status == 200:
            self.served.append(request.url.path.split("/")[2])
            return httpx.Response(200, json=PROFILE)
        error = {"message": f"told to say {status}", "code": "no", "param": None}
        return httpx.Response(status, json={"error": error}, headers=headers)


@pytest.fixture
def stub() -> Stub:
    return Stub()


def imported(stub: Stub, path: Path, at_a_time: int = 3) -> Counter[str]:
    with closing(Journal(path)) as journal:
        return import_people(stub.client, journal, path, at_a_time)


def test_import_retries_a_busy_gateway_and_bounds_requests(
    stub: Stub, tmp_path: Path, profiles: dict[str, list[Any]]
) -> None:
    stub.answers = [(200, {}), *((status, {"Retry-After": "0"}) for status in (503, 429, 502))]
    counts = imported(stub, written(tmp_path / "people", profiles))
    assert (counts["imported"], counts["failed"]) == (10, 0)
    assert sorted(stub.served) == sorted(profiles)
    assert stub.most <= 3


def test_an_import_that_was_broken_off_goes_on_where_it_stopped(
    stub: Stub, tmp_path: Path, profiles: dict[str, list[Any]]
) -> None:
    path, ids = written(tmp_path / "people", profiles), list(profiles)
    stub.answers = [(200, {})] * 4 + [(503, {"Retry-After": "61"})] * 100
    with pytest.raises(MtaError, match="told to say 503; gave up"):
        imported(stub, path, at_a_time=1)
    assert stub.served == ids[:4]
    stub.answers = []
    counts = imported(stub, path)
    assert (counts["imported"], counts["skipped"]) == (6, 4)
    assert sorted(stub.served) == sorted(ids)


@pytest.mark.parametrize("status", [401, 403])
def test_an_import_whose_key_is_refused_ends(stub: Stub, tmp_path: Path, status: int) -> None:
    stub.answers = [(status, {})] * 1000
    with pytest.raises(MtaError, match=f"told to say {status}"):
        imported(stub, written(tmp_path / "people", {f"user-{n}": ["hello"] for n in range(1000)}))
    assert len(stub.answers) > 900
    assert not (tmp_path / "people.failed.ndjson").exists()


def test_silent_gateway_is_given_up_and_refusal_not_retried(stub: Stub) -> None:
    nobody = mta_client.Client(f"http://127.0.0.1:{free_port()}", retry_s=0)
    with pytest.raises(MtaError, match=r"got no answer.*gave up .* at most 0 s"), gateway_errors(nobody):
        nobody.user("ada")
    stub.answers = [(413, {})]
    with pytest.raises(RequestRefused, match=r"^told to say 413$"), gateway_errors(stub.client):
        stub.client.put_profile("a", [])
    assert stub.answers == stub.served == []


def test_a_call_that_waits_ends_when_all_is_stopped(stub: Stub) -> None:
    stub.answers = [(503, {"Retry-After": "50"})]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stub.client.put_profile, "a", [])
        wait_until(lambda: not stub.answers, "the gateway to say that it is busy")
        stub.client.stop()
        with pytest.raises(mta_client.MtaError, match="told to say 503"):
            waiting.result()


def test_unreadable_file_and_invalid_gateway_url_are_named(tmp_path: Path) -> None:
    path = tmp_path / "people.json"
    assert "cannot read" in refusal("import", str(path))
    path.write_text("[1, 2")
    assert "is not JSON" in refusal("import", str(path))
    for url in ("localhost:8000", "ftp://host", "http://", "http://[", "http://a:port"):
        assert refusal("show", "ada", "--url", url).startswith(f"'{url}' is not the URL of a gateway")


def test_a_user_with_a_strange_id_is_shown_exported_and_erased(
    client: httpx.Client, gateway: GatewayThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # is for what is outside
    path = written(tmp_path / "one.ndjson", {STRANGE: ["hello"]})
    assert mta("import", str(path), "--url", gateway.url).exit_code == 0
    shown = mta("show", STRANGE, "--url", gateway.url)
    assert (shown.exit_code, STRANGE in shown.output, "a0" in shown.output) == (0, True, True)
    exported = mta("export", STRANGE, "--url", gateway.url)
    [file] = map(Path, exported.output.splitlines())
    assert (file.name, file.parent.name.startswith("export-")) == ("user.json", True)
    assert file.parent.resolve().parent == tmp_path
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert json.loads(file.read_text())["user_id"] == STRANGE
    assert "not empty" in refusal("export", STRANGE, "--url", gateway.url)
    assert mta("erase", STRANGE, "--url", gateway.url, typed="n\n").exit_code == 1
    assert mta("show", STRANGE, "--url", gateway.url).exit_code == 0
    erased = mta("erase", STRANGE, "--url", gateway.url, "--yes")
    assert "1 items, 0 samples" in erased.output
    assert "unknown" in refusal("show", STRANGE, "--url", gateway.url)
