"""A real chat app before the server, in a real browser: it is personal by its settings, and learns what people write.

    python -m deploy.console.chat_app --bank BANK --app-python APP/bin/python --out FOLDER

APP is an environment with Open WebUI alone (`python -m venv APP && APP/bin/pip install open-webui`). Somebody signs up,
writes some messages, one of them with a file, and waits for the answers and for what the app asks for by itself: title,
tags, follow-ups, search queries. Exit status 1 unless the person's own messages, and nothing else, became items.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from playwright.sync_api import Page

from adapters.errors import MtaError
from bench import script
from bench.page.report import marked, report
from bench.rig.processes import answers, mta, running, wait_until
from bench.rig.up import Up, up
from deploy.console.browser import HEIGHT, WIDTH, chromium, running_browser
from mta_client import Client
from server.supervisor.services import free_port

MESSAGES = (
    "I was up at five again, straight to the water, and it was flat. What would you do with a day like that?",
    "I walked along the pier instead and watched the old men fish. One of them gave me half of his breakfast.",
    "Tomorrow I want to fix the ding in my board. It has been in the garage since March, I keep putting it off.",
    "Here is the report for the week. Wednesday looks good to me, if only I can get off work before ten.",
)
FILE = "Surf report.\nMonday: two feet, light wind.\nTuesday: flat all day.\nWednesday: four feet and clean."
SETTINGS = {  # those of docs/adopting/chats.md
    "ENABLE_FORWARD_USER_INFO_HEADERS": "true",
    "TASK_MODEL_EXTERNAL": "base",
    "TASK_MODEL_PARAMS": '{"max_tokens": 100}',
    "DEFAULT_MODELS": "mta",
    "DEFAULT_MODEL_METADATA": '{"capabilities": {"builtin_tools": false}}',
    "RAG_SYSTEM_CONTEXT": "true",
}
ALONE = {  # short answers; it starts without other services and without models of its own
    "DEFAULT_MODEL_PARAMS": '{"max_tokens": 80}',
    "ENABLE_OLLAMA_API": "false",
    "BYPASS_EMBEDDING_AND_RETRIEVAL": "true",
    "RAG_EMBEDDING_ENGINE": "openai",
    "OFFLINE_MODE": "true",
    "HF_HUB_OFFLINE": "1",
    "ANONYMIZED_TELEMETRY": "false",
}
START_S = 600.0
ANSWER_S = 300.0


@dataclass(frozen=True, slots=True)
class Chat:
    """A finished chat as the app stores it."""

    user_id: str
    version: str  # of the app
    turns: Sequence[Mapping[str, str]]  # messages, oldest first

    @property
    def expected(self) -> list[dict[str, str]]:
        """The items that the person's messages make."""
        said = [turn["content"].strip() for turn in self.turns]
        pairs = [{"input": asked, "output": text} for asked, text in zip(said[1::2], said[2::2], strict=False)]
        return [{"text": said[0]}, *pairs]


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank of any task.")],
    app_python: Annotated[Path, typer.Option(help="The Python of an environment with the package `open-webui`.")],
    out: Annotated[Path, typer.Option(help="Folder for report and screenshot.")] = Path("out/chats"),
) -> None:
    """Chat, and check what the server has learnt."""
    browser = chromium()
    if browser is None:
        raise MtaError("this machine has no Chromium")
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        up(Path(scratch) / "mta", "--bank", str(bank), environment={"MTA_USER_HEADERS": "X-OpenWebUI-User-Id"}) as ran,
    ):
        key = _learning_key(ran)
        with (
            _app(app_python, Path(scratch), ran.url, key) as url,
            running_browser(browser) as started,
            started.new_context(viewport={"width": WIDTH, "height": HEIGHT}, locale="en-GB") as context,
        ):
            context.set_default_timeout(ANSWER_S * 1000)
            chat = _chat(context.new_page(), url, Path(scratch), out / "chat.png")
        rows, seen = _checked(ran, key, chat)
    typer.echo(f"screenshot: {out / 'chat.png'}")
    report(f"Open WebUI {chat.version}, {len(MESSAGES)} messages", rows, out / "chats.json", chat=asdict(chat), **seen)


def _learning_key(ran: Up) -> str:
    """Create an API key that learns and recalls, and wait until the gateway knows it."""
    made = mta("keys", "create", "chat", "--learn", "--history", "--data", str(ran.data))
    key = subprocess.run(made, capture_output=True, check=True, text=True).stdout.strip()
    headers = {"Authorization": f"Bearer {key}"}
    wait_until(lambda: httpx.get(f"{ran.url}/v1/models", headers=headers).is_success, "the key")
    return key


@contextmanager
def _app(python: Path, scratch: Path, url: str, key: str) -> Iterator[str]:
    """Run the app with the documented settings; yield its URL."""
    data, port = scratch / "app", str(free_port())
    data.mkdir()
    own = {"DATA_DIR": str(data), "STATIC_DIR": str(data / "static"), "WEBUI_SECRET_KEY": secrets.token_hex(16)}
    server = {"OPENAI_API_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key}
    command = [str(python.absolute().with_name("open-webui")), "serve", "--host", "127.0.0.1", "--port", port]
    foreign: dict[str, str | None] = {"PYTHONPATH": None}
    with running(command, {**foreign, **SETTINGS, **ALONE, **own, **server}, cwd=data) as process:
        process.wait_for("Uvicorn running on|Application startup complete|Scheduler worker started", START_S)
        wait_until(partial(answers, f"http://127.0.0.1:{port}/health"), "the app")
        yield f"http://127.0.0.1:{port}"


def _chat(page: Page, url: str, scratch: Path, picture: Path) -> Chat:
    """Sign up, send the messages, the last one with a file, and wait for everything that the app asks for."""
    page.goto(f"{url}/auth")
    page.get_by_role("button", name="Get started").click()
    page.locator("input[autocomplete=name]").fill("Mia Reed")
    page.locator("input[type=email]").fill("mia@example.com")
    page.locator("input[type=password]").first.fill(secrets.token_urlsafe(12))
    page.locator("button[type=submit]").click()
    page.get_by_role("button", name="Okay, Let's Go!").click()
    for count, message in enumerate(MESSAGES, 1):
        if count == len(MESSAGES):
            (scratch / "report.txt").write_text(FILE, encoding="utf-8")
            with page.expect_response(lambda answer: "/api/v1/files/" in answer.url and answer.ok):
                page.locator("input[type=file]").first.set_input_files(scratch / "report.txt")
            page.get_by_role("button", name="report.txt").first.wait_for()
        page.locator("#chat-input").click()
        page.keyboard.insert_text(message)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Good Response").nth(count - 1).wait_for()
        chat_id = page.url.rpartition("/")[2]
        wait_until(partial(_is_idle, page, f"{url}/api/tasks/chat/{chat_id}"), "the app's own questions", ANSWER_S)
    page.screenshot(path=picture)
    stored = _asked(page, f"{url}/api/v1/chats/{chat_id}")["chat"]["history"]
    turns, at = [], stored["currentId"]
    while at:
        turns.append(stored["messages"][at])
        at = turns[-1]["parentId"]
    told = [{name: turn[name] for name in ("role", "content")} for turn in reversed(turns)]
    version = _asked(page, f"{url}/api/version")["version"]
    return Chat(_asked(page, f"{url}/api/v1/auths/")["id"], version, told)


def _is_idle(page: Page, url: str) -> bool:
    return not _asked(page, url)["task_ids"]


def _asked(page: Page, url: str) -> dict[str, Any]:
    """Ask the app as the person who is signed in."""
    token = page.evaluate("localStorage.token")
    answer: dict[str, Any] = page.request.get(url, headers={"Authorization": f"Bearer {token}"}).json()
    return answer


def _checked(ran: Up, key: str, chat: Chat) -> tuple[list[tuple[str, object]], dict[str, object]]:
    """Compare the user's items and the gateway's log with the chat."""
    exported = httpx.get(f"{ran.url}/users/{chat.user_id}/export", headers={"Authorization": f"Bearer {key}"})
    items = [
        {name: text.strip() for name, text in item.items() if name != "id"} for item in exported.json().get("items", [])
    ]
    with Client(ran.url, key=key) as client:
        level = client.generate(chat.user_id, "Any plans for Sunday?", max_tokens=8).personalization.level
    text = (ran.data / "logs" / "gateway.log").read_text(encoding="utf-8")
    log = re.findall(r"POST /v1/chat/completions .*", text)
    levels = Counter(re.findall(r" chatcmpl-\w+ (\w+)", "\n".join(log)))
    refused = [line for line in log if " 200 " not in line]
    return [
        ("items: the person's messages and nothing else", marked(len(items), items == chat.expected)),
        ("level of the next answer", marked(level, level == "merged")),
        ("answers at level merged", marked(levels["merged"], levels["merged"] == len(MESSAGES) - 1)),
        # the first answer, whose writer is unknown; a title, tags, and follow-ups of each answer
        ("answers at level base", marked(levels["base"], levels["base"] >= 3 + len(MESSAGES))),
        ("requests that were refused or broken", marked(len(refused), not refused)),
    ], {"items": items, "log": log}


if __name__ == "__main__":
    script(main)
