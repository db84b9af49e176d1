"""The audit log: acts of API keys and of commands, in a file that is rotated, and `mta audit`."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapters.errors import MtaError
from server.cli import app
from server.observability.audit import audit_to
from server.store.tenants.access_keys import digest_of
from server.store.tenants.user_key import UserKeys
from tests.integration.security.conftest import create, keys
from tests.support.calls import put
from tests.support.gateway import SECRET, Keyed

pytestmark = pytest.mark.usefixtures("environment")


def entries(path: Path, count: int) -> list[dict[str, str]]:
    """The entries of a log, which must have so many: an entry comes before its answer."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) >= count
    return found


def audit(*arguments: str) -> list[dict[str, Any]]:
    shown = CliRunner().invoke(app, ["audit", "--json", *arguments])
    assert shown.exit_code == 0, shown.output
    return [json.loads(line) for line in shown.output.splitlines()]


def test_each_act_is_a_line_without_texts_names_and_secrets(
    log: Path, keyed: Keyed, acme: httpx.Client, shared_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"/users/{shared_name}"
    with caplog.at_level(logging.INFO, "mta.gateway"):
        answers = [acme.get(f"{path}/export"), acme.delete(path)]
        refused = acme.request("DELETE", path, headers=keyed.header("only generate"))
    assert refused.status_code == httpx.codes.FORBIDDEN
    of_gateway = entries(log, 2)
    secret, key_id = create("my app", "--tenant", "quiet")
    assert keys("revoke", key_id).exit_code == keys("revoke", key_id).exit_code == 0
    assert key_id in keys("list").output  # whole, also where there is no terminal
    assert keys("bank", "quiet", "0123abcd").exit_code == keys("bank", "quiet").exit_code == 0

    of_commands = entries(log, 7)[2:]
    acting = digest_of(keyed.secrets["acme"].encode())[:12]
    user = UserKeys(SECRET, "acme").key(shared_name)
    for entry, act, answer in zip(of_gateway, ("export", "erase"), answers, strict=True):
        assert re.fullmatch(r"20\d\d-[\d-]+T[\d:]+\.\d{3}Z", entry.pop("time"))
        assert entry == {
            **{"act": act, "outcome": str(answer.status_code), "tenant": "acme", "key": acting, "user": user},
            "request": answer.headers["X-Request-Id"],
        }
    assert [(entry["act"], entry.get("of_key"), entry.get("bank")) for entry in of_commands] == [
        ("key_created", key_id, None),
        ("key_revoked", key_id, None),
        ("key_revoked", key_id, None),  # the first command may have failed after the store had done it
        ("bank_chosen", None, "0123abcd"),
        ("bank_chosen", None, None),
    ]
    assert {(entry["key"], entry["tenant"], entry["outcome"]) for entry in of_commands} == {("cli", "quiet", "done")}
    assert not any(word in log.read_text() for word in (shared_name, secret, "my app", "swell"))
    assert stat.S_IMODE(log.stat().st_mode) == stat.S_IRUSR | stat.S_IWUSR
    assert any("export 200 " in line and f"tenant=acme key={acting}" in line for line in caplog.messages)


def test_a_log_that_is_moved_goes_on_under_its_name(log: Path, acme: httpx.Client, shared_name: str) -> None:
    for place in range(2):
        acme.delete(f"/users/{shared_name}")
        assert len(entries(log, 1)) == 1
        log.rename(log.with_suffix(f".{place}"))


def test_where_nothing_existed_no_line_is_left(log: Path, acme: httpx.Client, new_user: Callable[[], str]) -> None:
    path = f"/users/{new_user()}"
    assert [acme.delete(path).status_code, acme.get(f"{path}/export").status_code] == [404, 404]
    assert log.read_text() == ""


@pytest.mark.parametrize("fault", ["a part of a line", "no line on disk"])
def test_what_cannot_be_noted_is_not_acknowledged(
    fault: str, log: Path, acme: httpx.Client, shared_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    write, path = os.write, f"/users/{shared_name}"
    with monkeypatch.context() as broken:
        if fault == "no line on disk":
            broken.setattr(os, "fsync", refused)
        else:
            broken.setattr(os, "write", lambda file, line: write(file, line[:9]))
        answer = acme.delete(path)
        assert log.read_text() == "" or fault == "no line on disk"
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["X-Request-Id"]
    assert acme.delete(path).status_code == httpx.codes.OK
    assert entries(log, 1)[-1]["act"] == "erase"


def test_the_log_is_searched_by_act_key_user_and_time(
    log: Path, acme: httpx.Client, globex: httpx.Client, new_user: Callable[[], str]
) -> None:
    ada, bob = new_user(), new_user()
    for client, user in ((acme, ada), (acme, bob), (globex, ada)):
        put(client, user)
        client.get(f"/users/{user}/export")
        client.delete(f"/users/{user}")
    everything = entries(log, 6)
    assert audit() == everything
    assert audit(str(log), "--act", "erase") == everything[1::2]
    assert audit("--tenant", "globex") == everything[4:]
    assert audit("--tenant", "acme", "--user", bob) == everything[2:4]
    assert audit("--key", everything[0]["key"]) == everything[:4]
    assert audit("--since", "2020-01-01T00:00") == everything
    assert audit("--since", "2999-01-01") == []
    table = CliRunner().invoke(app, ["audit"], env={"COLUMNS": "200"})
    assert all(entry["user"] in table.output for entry in everything)
    assert "of_key" not in table.output
    log.write_text(log.read_text() + "no entry\n")
    assert "line 7 of" in str(CliRunner().invoke(app, ["audit"]).exception)


def test_a_log_that_cannot_be_written_or_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MtaError, match=r"cannot write the audit log .*nowhere.*MTA_AUDIT"):
        audit_to(tmp_path / "nowhere" / "audit.jsonl")
    monkeypatch.delenv("MTA_AUDIT", raising=False)
    monkeypatch.setenv("MTA_DATA_DIR", str(tmp_path))  # of an `mta up` that never was
    assert f"cannot read the audit log {tmp_path}" in str(CliRunner().invoke(app, ["audit"]).exception)
    assert "cannot read" in str(CliRunner().invoke(app, ["audit", str(tmp_path / "none")]).exception)
