"""Drafts by another model: each of people's plain texts is sent to a server of OpenAI's API, which answers with one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any, BinaryIO

import httpx

from adapters.errors import excerpt
from bank.errors import BankError
from bank.items.drafts import notes_of
from bank.items.histories import History
from bank.items.profile import PLAIN, Item, is_pair
from bank.items.tasks import Task

PROMPT = (
    "Say what this text says in plain and neutral words, as somebody else would. Keep its language and all facts, "
    "names, numbers and links. Answer with the new text alone: {text}"
)
AT_ONCE, TRIES, TIMEOUT_S, LONGEST_PAUSE_S = 8, 5, 300.0, 60.0
SPARE_TOKENS = 32  # beyond half as many as the text has bytes; a draft that needs more repeats itself
_ITEMS, _MADE_BY = "items.jsonl", ".drafts.json"


@dataclass(frozen=True, slots=True)
class Drafter:
    """A model behind OpenAI's API, by the URL that its clients take, which mostly ends with /v1."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if any("@" in part for part in self.url.split("/")[:3]):  # the scheme and the host
            raise BankError(
                "the URL of --drafts-by has a name or password before @, which the bank would keep: leave it out, and "
                "set MTA_DRAFTS_KEY to a key"
            )

    @property
    def record(self) -> dict[str, str]:
        """What a folder of drafts, and the bank built from it, keep of how they were made."""
        return {"drafts_by": self.url, "drafts_model": self.model, "drafts_prompt": PROMPT}

    def draft_of(self, text: str) -> str | None:
        """Ask for one draft; None if the text is refused, or the draft does not end. BankError if the server fails."""
        body: dict[str, Any] = {"model": self.model, "temperature": 0}
        body["messages"] = [{"role": "user", "content": PROMPT.format(text=text)}]
        body["max_tokens"] = len(text.encode()) // 2 + SPARE_TOKENS
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        for attempt in range(TRIES):
            pause_s = 2.0**attempt
            try:
                url = f"{self.url.rstrip('/')}/chat/completions"
                answer = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT_S)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                why = str(error) or type(error).__name__
            else:
                if answer.is_success:
                    return _content(answer, self.url)
                why = f"status {answer.status_code}: {excerpt(answer.text)}"
                if answer.status_code in (400, 413, 422):
                    return None
                if answer.status_code < 500 and answer.status_code not in (408, 429):
                    break
                if (after := answer.headers.get("Retry-After", "")).isdecimal():
                    pause_s = min(float(after), LONGEST_PAUSE_S)
            if attempt + 1 < TRIES:
                sleep(pause_s)
        raise BankError(
            f"{self.url} gave no draft ({why}): check the URL, the model {self.model!r} and MTA_DRAFTS_KEY, then run "
            "the same command again; it continues"
        )


def _content(answer: httpx.Response, url: str) -> str | None:
    try:
        choice = answer.json()["choices"][0]
        content, has_ended = choice["message"]["content"], choice["finish_reason"] != "length"
    except (ValueError, LookupError, TypeError):
        raise BankError(f"{url} answered with no chat completion: {excerpt(answer.text)}") from None
    return content.strip() or None if has_ended and isinstance(content, str) else None


def undrafted(person: History, task: Task) -> dict[str, str]:
    """Return a person's plain texts that say enough to be drafted, by the item's id."""
    if not task.drafted:
        raise BankError(f"the task {task.name} has no drafts: use --task rewrite")
    fields = set(task.pair_fields)
    plain = (item for item in person.items if not (is_pair(item.fields) or fields <= set(item.fields)))
    return {item.id: text for item in plain if notes_of(text := item.fields.get(PLAIN, ""))}


def write_drafts(
    people: Sequence[History], task: Task, drafter: Drafter, out: Path, done: Callable[[int], None]
) -> int:
    """Write the people's items with their drafts to `out/PERSON/items.jsonl`; return how many texts got none.

    A draft is kept as soon as it is made, so a run that was stopped continues. `done` gets the number of texts that are
    finished, at the start too. BankError if `out` holds another model's drafts.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (others := made_by(out)) and others != drafter.record:
        raise BankError(f"{out} holds drafts by {others['drafts_model']} of {others['drafts_by']}: name another --out")
    (out / _MADE_BY).write_text(json.dumps(drafter.record))
    finished = refused = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for person in people:
            folder = out / person.user_id.replace("/", "%2F").replace(".", "%2E", person.user_id.startswith("."))
            folder.mkdir(exist_ok=True)
            with (folder / _ITEMS).open("a+b") as file:
                kept, texts = _kept(file), undrafted(person, task)
                known = texts.keys() & kept.keys()
                finished += len(known)
                refused += sum("draft" not in kept[each] for each in known)
                done(finished)
                missing = [item for item in person.items if item.id not in kept]
                with closing(_written(file, missing, texts, drafter, pool)) as written:
                    for has_draft in written:
                        finished += 1
                        refused += not has_draft
                        done(finished)
    return refused


def _written(
    file: BinaryIO, items: Sequence[Item], texts: Mapping[str, str], drafter: Drafter, pool: ThreadPoolExecutor
) -> Generator[bool]:
    """Write items in order, and yield for each text whether it has a draft; if the caller stops, no more are asked."""
    waiting = {item.id: pool.submit(drafter.draft_of, texts[item.id]) for item in items if item.id in texts}
    try:
        for item in items:
            draft = waiting[item.id].result() if item.id in waiting else None
            fields = {"id": item.id, **item.fields} | ({"draft": draft} if draft else {})
            file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
            file.flush()
            if item.id in waiting:
                yield draft is not None
        os.fsync(file.fileno())
    finally:
        for each in waiting.values():
            each.cancel()


def _kept(file: BinaryIO) -> dict[str, dict[str, str]]:
    """Return the items that an earlier run wrote, by id; a line that it did not finish is removed."""
    file.seek(0)
    written = file.read()
    file.truncate(written.rfind(b"\n") + 1)
    return {item["id"]: item for item in map(json.loads, written.split(b"\n")[:-1])}


def made_by(users: Path) -> Mapping[str, str]:
    """Return how the drafts in a folder of people were made; nothing if they are not by `write_drafts`."""
    path = users / _MADE_BY
    return json.loads(path.read_text()) if path.is_file() else {}
