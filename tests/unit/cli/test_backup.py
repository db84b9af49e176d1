"""What `mta backup` and `mta restore` refuse before they open a store, and which copies are deleted."""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.errors import MtaError
from server.cli import app
from server.observability.audit import audit_to
from server.store.backup.folder import (
    DATA,
    MANIFEST,
    Entry,
    delete_old_copies,
    open_copy,
    read_entries,
    user_of,
    write_copy,
)
from server.store.backup.restoring import Since, read_logs
from server.store.tenants.user_key import check_values

SECRET, USER = "a secret of sixteen bytes", "a" * 26
ENTRIES = [
    [(f"mta:{{{USER}}}:profile", 0, b"\x00\nbinary\xff"), (f"mta:{{{USER}}}:epoch", 1 << 42, b"")],
    [("mta:adapted", 0, b"{}")],
]


class Store:
    """As much as a copy needs of one."""

    secret, version = check_values(SECRET)[0], "valkey 9.1.0"

    async def entries(self, progress: Callable[[int, int], None]) -> AsyncIterator[Entry]:
        for entry in ENTRIES:
            yield entry


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete copy; commands have its secret, and no store."""
    monkeypatch.setenv("MTA_SECRET", SECRET)
    monkeypatch.setenv("MTA_REDIS_URL", "redis://127.0.0.1:1")

    return asyncio.run(write_copy(tmp_path / "copies", Store(), lambda done, of: None))[0]


def refusal(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(done.exception, MtaError), done.output
    return str(done.exception)


def test_a_copy_is_read_as_it_was_written_and_by_its_owner_alone(copy: Path) -> None:
    manifest = open_copy(copy)
    assert (manifest.keys, manifest.users, manifest.store) == (3, 1, "valkey 9.1.0")
    assert list(read_entries(copy)) == ENTRIES
    assert [user_of(entry) for entry in ENTRIES] == [USER, None]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in copy.iterdir()} == {MANIFEST: 0o600, DATA: 0o600}
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    assert SECRET not in (copy / MANIFEST).read_text()


def test_incomplete_damaged_or_foreign_copy_is_refused(copy: Path) -> None:
    said = refusal("restore", copy.parent, "--without-erasures")
    assert f"It contains the copies {copy.name}: name one" in said
    raw = (copy / DATA).read_bytes()
    (copy / DATA).write_bytes(raw[:-1])
    assert f"{copy / DATA} is damaged" in refusal("restore", copy, "--without-erasures")
    (copy / DATA).unlink()
    assert f"{copy} is not a complete copy of a store: [Errno 2]" in refusal("restore", copy, "--without-erasures")
    (copy / DATA).write_bytes(raw)
    written = (copy / MANIFEST).read_text()
    for text, said in (('"format": 2', "has the format 2"), ('"newer": 1', "unexpected keyword argument 'newer'")):
        (copy / MANIFEST).write_text(written.replace('"format": 1', text))
        assert said in refusal("restore", copy, "--without-erasures")


def test_who_was_erased_must_be_named_or_brought_back_on_purpose(copy: Path, tmp_path: Path) -> None:
    assert "--erased FILE, or else give --without-erasures" in refusal("restore", copy)
    log = tmp_path / "audit.jsonl"
    assert "or else give" in refusal("restore", copy, "--erased", log, "--without-erasures")
    assert f"cannot read the audit log {log}" in refusal("restore", copy, "--erased", log)
    log.write_text('{"act": "erase"\n')
    assert f"line 1 of {log} is not an entry" in refusal("restore", copy, "--erased", log)


def test_another_secret_and_none_are_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_SECRET", SECRET[::-1])
    assert f"{copy} was made with another MTA_SECRET" in refusal("restore", copy, "--without-erasures")
    monkeypatch.delenv("MTA_SECRET")
    assert "MTA_SECRET is not set" in refusal("restore", copy, "--without-erasures")


def test_silent_store_leaves_no_copy_and_an_audit_line(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTA_AUDIT", str(tmp_path / "audit.jsonl"))
    for command in (("backup", "--out", copy.parent), ("restore", copy, "--without-erasures")):
        assert "MTA_REDIS_URL is correct" in refusal(*command)
    audit_to(None)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    (line,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert (line["act"], line["outcome"], line["key"]) == ("restore", "begun", "cli")


def test_a_data_folder_that_cannot_be_read_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTA_REDIS_URL", raising=False)
    said = refusal("backup", "--out", copy.parent, "--data", copy / MANIFEST)
    assert f"cannot read {copy / MANIFEST}" in said
    assert "Not a directory. Be the user who runs `mta up`" in said


def test_what_the_logs_say_counts_from_shortly_before_the_copy(copy: Path, tmp_path: Path) -> None:
    manifest, told = open_copy(copy), list[str]()
    began = datetime.fromisoformat(manifest.began)

    def log(name: str, *acts: tuple[str, int, str, str]) -> Path:
        lines = [
            {"act": act, "time": (began + timedelta(seconds=s)).isoformat(), "outcome": outcome, "tenant": "acme"}
            | {"user" if act == "erase" else "of_key": what}
            for act, s, outcome, what in acts
        ]
        (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return tmp_path / name

    rotated = log("audit.jsonl.1", ("erase", -11, "200", "before"), ("erase", -9, "200", "perhaps before"))
    newest = log(
        "audit.jsonl",
        *(("erase", 1, "200", "erased"), ("erase", 1, "404", "unknown"), ("erase", 2, "503", "perhaps erased")),
        *(("key_revoked", 3, "done", "0" * 12), ("key_created", 3, "done", "1" * 12), ("export", 4, "200", "x")),
    )
    gone = dict.fromkeys(("perhaps before", "erased", "unknown", "perhaps erased"), "acme")
    assert read_logs(manifest, [rotated, newest], told.append) == Since(gone, {"0" * 12}, exchanged=False)
    (warning,) = told
    assert f"{newest} has no entry from before the copy" in warning
    assert read_logs(manifest, [newest.parent], told.append) == Since(gone, {"0" * 12}, exchanged=False)
    assert told == [warning]
    (tmp_path / "no logs").mkdir()
    assert "no audit log" in refusal("restore", copy, "--erased", tmp_path / "no logs")


def test_old_copies_are_deleted_also_those_that_were_broken_off(copy: Path) -> None:
    copies, now = copy.parent, datetime.now(UTC)
    for days, manifest in ((6, True), (8, True), (9, False)):
        folder = copies / (now - timedelta(days=days)).strftime("%Y-%m-%dT%H%M%S.%fZ")
        folder.mkdir()
        (folder / DATA).touch()
        if manifest:
            (folder / MANIFEST).touch()
    (copies / "2020-01-01T-of-somebody-elseZ").mkdir()
    old = sorted(copies.iterdir())[1:3]
    assert delete_old_copies(copies, 7) == old
    assert len(list(copies.iterdir())) == 3
    shutil.rmtree(copy)
    assert delete_old_copies(copies, 1) == [], "the newest complete copy stays"
    assert refusal("backup", "--out", copies, "--keep-days", 1)  # the store does not answer
    folder.mkdir()
    (folder / DATA).touch()
    assert refusal("backup", "--out", copies, "--keep-days", 1)
    assert not folder.exists(), "expired copies are deleted also if no new one can be made"
