"""People's texts in folders and mailboxes: what becomes an item, and what is left out with which reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bank.building.build import read_inputs
from bank.building.options import BuildInputs, BuildOptions
from bank.errors import BankError
from bank.items.folders import PersonTexts, people_in, read_person
from bank.items.histories import read_histories
from bank.items.mail import MAX_LINES, MAX_MAIL_BYTES, Mail, UnusableError, read_mail
from bank.items.tasks import get_task

CHAT, HEADLINES = get_task("chat"), get_task("news_headline")
SAID = "The sea was flat all week long."
ASKED = "On Mon, 30 Nov 2026 at 10:00, Ann <ann@x.org> wrote:\n> How was the sea?\n> Tell me soon.\n"
HTML = "text/html; charset=utf-8"


def mail(body: str, kind: str = "text/plain; charset=utf-8", **headers: str) -> bytes:
    given = {
        "From": "Rosa <Rosa@x.org>",
        "Subject": "Re: AW: Boats",
        "Date": "Tue, 1 Dec 2026 10:00:00 +0000",
    } | headers
    return "\n".join([*(f"{k}: {v}" for k, v in given.items()), f"Content-Type: {kind}", "", body]).encode()


def person(folder: Path, files: dict[str, bytes], task: object = CHAT) -> PersonTexts:
    """Read a person whose folder holds these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return read_person(folder, task)  # type: ignore[arg-type]


def reasons(found: PersonTexts) -> dict[str, str]:
    return {each.where: each.why for each in found.left_out}


@pytest.mark.parametrize(
    ("body", "words", "quoted"),
    [
        (f"Hi Ann,\n{SAID}\nBest regards,\nRosa\n-- \nRosa Ltd", f"Hi Ann,\n{SAID}\nBest regards,\nRosa", ""),
        (f"{SAID}\n\n{ASKED}", SAID, "How was the sea?\nTell me soon."),
        (f"{ASKED}\n{SAID}\n> And the wind?\nNone.", f"{SAID}\n\nNone.", "How was the sea?\nTell me soon."),
        (f"{SAID}\n\n{ASKED}>> and what was before", SAID, "How was the sea?\nTell me soon."),
        (f"{SAID}\n\n----- Original Message -----\nFrom: Bob\nSubject: x\n\nHis own words.", SAID, ""),
    ],
    ids=["signature", "above", "between", "nested", "forwarded"],
)
def test_a_mail_is_what_its_sender_wrote_in_it(body: str, words: str, quoted: str) -> None:
    assert read_mail(mail(body)) == Mail("rosa@x.org", 1796119200.0, "Boats", words, quoted)


def test_a_mail_in_html_alone_is_its_text() -> None:
    quote = "On Mon, 30 Nov 2026 at 10:00, Ann &lt;a@x&gt; wrote:<br><blockquote>How was the sea?</blockquote>"
    body = f"<html><head><style>p{{}}</style></head><p>Hi Ann,</p><div>{SAID}</div><div>{quote}</div></html>"
    found = read_mail(mail(body, HTML))
    assert (found.words, found.quoted) == (f"Hi Ann,\n{SAID}", "How was the sea?")


def test_html_that_declares_an_encoding_is_read() -> None:
    assert read_mail(mail(f"<?xml version='1.0' encoding='utf-8'?><html>{SAID}</html>", HTML)).words == SAID


def test_an_attachment_is_not_read() -> None:
    kind = "Content-Type: text/plain\n"
    parts = f"--B\n{kind}\n{SAID}\n--B\n{kind}Content-Disposition: attachment\n\nno\n--B--"
    assert read_mail(mail(parts, 'multipart/mixed; boundary="B"')).words == SAID


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00\xff" * 99,
        mail("ok"),
        mail(SAID, "text/plain; charset=klingon"),
        mail(SAID, From=""),
        mail(ASKED),
        mail("line\n" * (MAX_LINES + 1)),
        mail("--B\n\n" * 5000, 'multipart/mixed; boundary="B"'),
        b"x" * (MAX_MAIL_BYTES + 1),
        mail("", "image/png"),
    ],
    ids=["empty", "bytes", "short", "charset", "sender", "quotes", "lines", "parts", "size", "picture"],
)
def test_a_mail_that_cannot_be_used_says_why(raw: bytes) -> None:
    with pytest.raises(UnusableError):
        read_mail(raw)


def test_a_mail_without_a_date_is_the_oldest() -> None:
    assert read_mail(mail(SAID, Date="yesterday")).sent == 0


def test_nested_parts_without_end_do_not_end_the_reading() -> None:
    raw = b"From: a@x.org\n"
    for level in range(3000):
        raw += b'Content-Type: multipart/mixed; boundary="%d"\n\n--%d\n' % (level, level)
    with pytest.raises(UnusableError):
        read_mail(raw)


def test_a_reply_is_a_lesson_where_people_write_freely() -> None:
    answer = Mail("rosa@x.org", 0.0, "Boats", SAID, "How was the sea?")
    assert answer.item(CHAT) == {"input": 'Reply to this mail about "Boats": How was the sea?', "output": SAID}
    assert Mail("rosa@x.org", 0.0, "Boats", SAID, "").item(CHAT)["input"] == 'Write a mail about "Boats".'
    assert answer.item(HEADLINES) == {"text": SAID}


def test_texts_come_first_and_mails_by_their_date(tmp_path: Path) -> None:
    files = {
        "1.eml": mail(f"{SAID} late", Date="Tue, 1 Dec 2026 10:00:00 +0000"),
        "2.eml": mail(f"{SAID} early", Date="Tue, 1 Dec 2020 10:00:00 +0000"),
        "z/notes.md": b"\xef\xbb\xbfMy own notes about the sea",
        "a.jsonl": b'{"input": "And the wind?", "output": "None."}\n\n"A text of my own about the wind"\n',
    }
    items = person(tmp_path / "rosa", files).items.values()
    texts = [item.fields.get("output") or item.fields["text"] for item in items]
    assert texts == [
        "None.",
        "A text of my own about the wind",
        "My own notes about the sea",
        f"{SAID} early",
        f"{SAID} late",
    ]


def test_each_fault_has_its_place_and_its_reason(tmp_path: Path) -> None:
    files = {
        "a.txt": b"\xff\xfe",
        "b.jsonl": b'{"text": 5\n{"a": 1}\n{"text": "nul \\u0000 in it"}\n',
        "c.txt": SAID.encode(),
        "d.txt": b"the  SEA was flat\nall week long.",
        "e.png": b"x",
        "f.txt": b"x = [" * 20000,
        "g.mbox": b"nothing",
        "long.txt": b"words " * 20000,
        "/".join("123456789") + "/deep.txt": SAID.encode(),
    }
    folder = tmp_path / "rosa"
    folder.mkdir()
    (folder / "link.txt").symlink_to("/etc/passwd")
    (folder / "links").symlink_to("/etc")
    (folder / ".hidden.txt").write_text(SAID)
    found = person(folder, files)
    assert [item.fields["text"] for item in found.items.values()] == [SAID]
    assert sorted(reasons(found)) == [
        "rosa/" + "/".join("123456789"),
        "rosa/a.txt",
        "rosa/b.jsonl, line 1",
        "rosa/b.jsonl, line 2",
        "rosa/b.jsonl, line 3",
        "rosa/d.txt",
        "rosa/e.png",
        "rosa/f.txt",
        "rosa/g.mbox",
        "rosa/link.txt",
        "rosa/links",
        "rosa/long.txt",
    ]


def test_a_mailbox_is_its_person(tmp_path: Path) -> None:
    box = tmp_path / "rosa@x.org.mbox"
    box.write_bytes(b"".join(b"From x Tue Dec  1 10:00:00 2026\n" + mail(each) + b"\n" for each in (SAID, "ok")))
    found = read_person(box, CHAT)
    assert found.user_id == "rosa@x.org" and len(found.items) == 1
    assert list(reasons(found)) == ["rosa@x.org.mbox, mail 2"]


def test_mails_of_others_are_nobodys_items(tmp_path: Path) -> None:
    files = {"1.eml": mail(SAID), "2.eml": mail(f"{SAID} Bob.", From="bob@x.org")}
    assert list(reasons(person(tmp_path / "rosa@X.org", files))) == ["rosa@X.org/2.eml"]
    unnamed = person(tmp_path / "rosa", files)
    assert not unnamed.items and len(unnamed.left_out) == 2


def test_what_is_no_persons_folder_is_left_out(tmp_path: Path) -> None:
    person(tmp_path / "rosa", {"a.txt": SAID.encode()})
    (tmp_path / "stray.txt").write_text(SAID)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "rosa")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).mkdir()
    left_out = list[str]()
    (known,) = read_histories(tmp_path, CHAT, on_left_out=lambda each: left_out.append(each.where))
    assert known.user_id == "rosa" and left_out == ["empty", "link", "stray.txt", "\ufffd"]


def test_a_person_with_two_places_is_refused(tmp_path: Path) -> None:
    person(tmp_path / "rosa", {"a.txt": SAID.encode()})
    (tmp_path / "rosa.mbox").write_bytes(b"From x Tue Dec  1 10:00:00 2026\n" + mail(SAID) + b"\n")
    with pytest.raises(BankError, match="rosa"):
        read_histories(tmp_path, CHAT)


@pytest.mark.parametrize("given", ["missing", "empty"])
def test_a_folder_without_people_is_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BankError, match=given):
        read_histories(tmp_path / given, CHAT)


def test_a_folder_has_no_queries(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="--last"):
        read_histories(tmp_path, CHAT, queries=True)


def test_a_build_takes_what_a_folder_holds(tmp_path: Path) -> None:
    person(tmp_path / "rosa", {"a.txt": SAID.encode(), "b.png": b""})
    left_out = list[str]()
    inputs, options = BuildInputs(tmp_path, tmp_path, "", tmp_path), BuildOptions("chat")
    people, _ = read_inputs(inputs, CHAT, options, on_left_out=lambda each: left_out.append(each.why))
    assert [each.user_id for each in people] == ["rosa"] and left_out == ["is no .txt, .md, .eml, .mbox or .jsonl file"]
    assert people_in(tmp_path) == [tmp_path / "rosa"]
