"""People's texts in folders: `FOLDER/rosa/` with their .txt, .md, .eml, .mbox and .jsonl files, or `FOLDER/rosa.mbox`.

What cannot be used is left out, with the reason; nothing in the files ends the reading.
"""

from __future__ import annotations

import mailbox
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from bank.errors import BankError, ProfileError
from bank.items.mail import MAX_MAIL_BYTES, NO_WORDS, Mail, UnusableError, own_address, read_mail
from bank.items.own_words import own_words
from bank.items.profile import Item, item_text, normalised, parse_item
from bank.items.tasks import Task

MAX_DEPTH = 8  # folders within a person's
MAX_ITEM_BYTES = 64 << 10  # as JSON, as in a profile
MAX_FILE_BYTES = 64 << 20  # of a file of texts or items
MAILBOX = ".mbox"
KINDS = ".txt, .md, .eml, .mbox or .jsonl"
NOT_OWN = "is not from the person's own address"
MANY_SENDERS = "is one of several senders' mails: name the folder or mbox by the person's address"


@dataclass(frozen=True, slots=True)
class LeftOut:
    where: str  # the file's path from the folder of people on, with the number of the mail or the line
    why: str


@dataclass(slots=True)
class PersonTexts:
    """A person's items, texts by name and then mails, oldest first, and what was left out of their files."""

    user_id: str
    items: dict[str, Item] = field(default_factory=dict)  # by id
    left_out: list[LeftOut] = field(default_factory=list)
    _texts: set[str] = field(default_factory=set)

    def add(self, raw: Any, task: Task) -> None:
        """Keep an item; ProfileError or UnusableError if it is not valid, too large, or says the same as another."""
        item = parse_item(raw, task, 0)
        if (size := len(orjson.dumps(dict(item.fields)))) > MAX_ITEM_BYTES:
            raise UnusableError(f"has {size} bytes as JSON; at most {MAX_ITEM_BYTES} are allowed")
        if (text := normalised(item_text(item, task))) in self._texts:
            raise UnusableError("says the same as an earlier one")
        self._texts.add(text)
        self.items[item.id] = item

    @contextmanager
    def leaving_out(self, where: str) -> Iterator[None]:
        """Note what cannot be used, and go on."""
        try:
            yield
        except OSError as error:
            self.left_out.append(LeftOut(where, f"cannot be read: {error.strerror or error}"))
        except ProfileError as error:
            self.left_out.append(LeftOut(where, f"is no item: {str(error).removeprefix('items.0.')}"))
        except UnusableError as error:
            self.left_out.append(LeftOut(where, str(error)))


def people_in(folder: Path) -> list[Path]:
    """Return the people's folders and mailboxes by name, and whatever else lies beside them."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BankError(f"cannot read {folder}: {error.strerror or error}") from error


def read_person(path: Path, task: Task) -> PersonTexts:
    """Read the texts of one of `people_in`; a person without items has the reasons in `left_out`."""
    is_mailbox = path.suffix.lower() == MAILBOX and path.is_file()
    person = PersonTexts(unicodedata.normalize("NFC", _shown(path.stem if is_mailbox else path.name)))
    mails = list[tuple[str, Mail]]()
    for file in [path] if path.is_file() or path.is_symlink() else _files(path):
        name = _shown(file.relative_to(path.parent))
        with person.leaving_out(name):
            if file is path and not is_mailbox:
                raise UnusableError("is no folder and no mailbox of a person")
            for source, read in _readers(file):
                with person.leaving_out(name + source):
                    text = read()
                    if isinstance(text, Mail):
                        mails.append((name + source, text))
                    else:
                        person.add(text, task)
    own = own_address(person.user_id, {mail.sender for _, mail in mails})
    for where, mail in sorted(mails, key=lambda each: each[1].sent):
        with person.leaving_out(where):
            if mail.sender != own:
                raise UnusableError(NOT_OWN if own else MANY_SENDERS)
            person.add(mail.item(task), task)
    if not (person.items or person.left_out):
        person.left_out.append(LeftOut(_shown(path.name), "is empty"))
    return person


def _shown(path: Path | str) -> str:
    """Return a path with U+FFFD in place of bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _files(folder: Path) -> Iterator[Path]:
    """Yield a person's files, and links, by path; hidden ones are nobody's texts."""
    for name, folders, files in os.walk(folder):
        path = Path(name)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        links = [each for each in folders if (path / each).is_symlink()]
        yield from (path / each for each in sorted([*files, *links]) if not each.startswith("."))
        if len(path.relative_to(folder).parts) == MAX_DEPTH:
            yield from (path / each for each in folders if each not in links)
            folders.clear()


def _readers(file: Path) -> Iterator[tuple[str, Callable[[], Mail | Any]]]:
    """Yield what a file holds: its place in the file, and how to read it; UnusableError if the file holds nothing."""
    if file.is_symlink():
        raise UnusableError("is a link, which is not followed")
    if file.is_dir():
        raise UnusableError(f"lies more than {MAX_DEPTH} folders deep")
    match file.suffix.lower():
        case ".txt" | ".md":
            yield "", partial(_text, file)
        case ".eml":
            yield "", partial(_mail, file)
        case ".mbox":
            box = mailbox.mbox(file, create=False)
            if not (keys := box.keys()):
                raise UnusableError("holds no mail")
            for number, key in enumerate(keys, 1):
                yield f", mail {number}", partial(_mail, box, key)
        case ".jsonl":
            for number, line in enumerate(_bytes(file, MAX_FILE_BYTES).splitlines(), 1):
                if line.strip():
                    yield f", line {number}", partial(_item, line)
        case _:
            raise UnusableError(f"is no {KINDS} file")


def _bytes(file: Path, most: int) -> bytes:
    with file.open("rb") as opened:
        raw = opened.read(most + 1)
    if len(raw) > most:
        raise UnusableError(f"is larger than {most >> 20} MiB")
    return raw


def _mail(source: mailbox.mbox | Path, key: str = "") -> Mail:
    return read_mail(_bytes(source, MAX_MAIL_BYTES) if isinstance(source, Path) else source.get_bytes(key))


def _text(file: Path) -> dict[str, str]:
    try:
        text = own_words(_bytes(file, MAX_FILE_BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UnusableError(f"is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text:
        raise UnusableError(NO_WORDS)
    return {"text": text}


def _item(line: bytes) -> Any:
    try:
        item = orjson.loads(line)
        return {"text": item} if isinstance(item, str) else item
    except ValueError as error:
        raise UnusableError(f"is not JSON: {error}") from error
