"""`python -m deploy.console.pictures`: take pictures of the console's pages, with the demo's bank and a real engine.

They go to docs/pictures/console_*.png and show real requests and answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from PIL import Image
from playwright.sync_api import Page

from bench import script
from demo import adapting
from demo.personas import PEOPLE, QUESTIONS
from deploy.console.browser import TRAINING_MS, Looking, chromium, looking, running_browser
from server.cli.demo.server import DemoError, Server, demo_bank, running_server

OUT = Path(__file__).resolve().parents[2] / "docs" / "pictures"
QUESTION = QUESTIONS[3]
WRITER = PEOPLE[2]


def playground(look: Looking) -> Page:
    """Show a user's writing and both answers."""
    page = look.visit("playground", tokens=64)
    page.get_by_label("A few lines").fill("\n\n".join(line.replace("\n\n", "\n") for line in WRITER.lines))
    page.get_by_label("A few lines").evaluate("area => { area.scrollTop = 0; }")
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("tokens/s").nth(1).wait_for()
    return page


def users(look: Looking) -> Page:
    """Show the stored data of a user."""
    page = look.visit("users", id=adapting.USER)
    page.get_by_role("region", name="What is stored").wait_for()
    return page


def adapt(look: Looking) -> Page:
    """Show a finished job."""
    page = look.visit("adapt", user=adapting.USER)
    page.get_by_label("Samples", exact=True).fill("\n".join(map(json.dumps, adapting.samples())))
    page.get_by_label("Questions to ask").fill(QUESTION)
    page.get_by_label("Samples", exact=True).evaluate("area => { area.scrollTop = 0; }")
    page.get_by_label("Steps at most").fill("40")
    page.get_by_role("button", name="Train on").click()
    page.get_by_text("Succeeded").wait_for(timeout=TRAINING_MS)
    page.get_by_text("with an adapter of their own").wait_for()
    page.locator("[aria-busy=true]").wait_for(state="detached")
    return page


def bank(look: Looking) -> Page:
    """Show the map with a user on it."""
    page = look.visit("bank", user=WRITER.user_id)
    page.locator(".person").wait_for()
    return page


def system(look: Looking) -> Page:
    """Show the figures during generations."""
    page = look.visit("system")
    page.get_by_role("region", name="Training jobs").wait_for()
    with looking(page.context.browser, look.url) as other:  # type: ignore[arg-type]
        for person in PEOPLE:
            other.visit("playground", user=person.user_id, ask=QUESTION, tokens=48)
            other.page.get_by_text("tokens/s").nth(1).wait_for()
    page.wait_for_timeout(2500)  # the next look at the figures
    return page


PAGES: dict[str, Callable[[Looking], Page]] = {
    "playground": playground,
    "adapt": adapt,
    "users": users,
    "bank": bank,
    "system": system,
}
"""The pages in order: `users` must follow `adapt`, to show an adapter."""

ALSO_DARK = ("playground",)


def take(server: Server, folder: Path) -> None:
    """Take all pictures.

    Raises:
        DemoError: if there is no browser, or a page reports errors.
    """
    executable = chromium()
    if executable is None:
        raise DemoError("this machine has no Chromium: `deploy/setup.sh tools` installs it where it can")
    with running_browser(executable) as browser, looking(browser, server.api.url) as look:
        for name, show in PAGES.items():
            page = show(look)
            _save(page, folder / f"console_{name}.png")
            if name in ALSO_DARK:
                page.emulate_media(color_scheme="dark")
                _save(page, folder / f"console_{name}_dark.png")
                page.emulate_media(color_scheme="light")
        if look.faults:
            raise DemoError(f"the console complains: {look.faults}")


def _save(page: Page, path: Path) -> None:
    """Save the whole page in 256 colours: a third of the bytes without a visible difference."""
    picture = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main(out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = OUT) -> None:
    """Take pictures of the console's pages, with the demo's bank and a real engine."""
    out.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory() as data,
        running_server(demo_bank(), Path(data) / "data", print) as server,
    ):
        for person in PEOPLE:
            server.api.put_profile(person.user_id, person.lines)
        take(server, out)


if __name__ == "__main__":
    script(main)
