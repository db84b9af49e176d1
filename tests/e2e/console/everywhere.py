"""What holds on every page: accessible, readable in light and dark, at any width, by keyboard."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from deploy.console.browser import Looking
from deploy.demo.personas import QUESTIONS
from tests.e2e.console.playground import answered

PLACES: dict[str, dict[str, Any]] = {
    "playground": {"user": "rosa", "ask": QUESTIONS[1], "tokens": 24},
    "users": {"id": "rosa"},
    "adapt": {"user": "kai"},
    "bank": {"user": "rosa"},
    "system": {},
}
WIDTHS = (360, 375, 768, 1440, 2560)
each_place = pytest.mark.parametrize("place", PLACES)


def _settled(look: Looking, place: str) -> Page:
    """A page with something on it."""
    page = look.visit(place, **PLACES[place])
    match place:
        case "playground":
            answered(page)
        case "users":
            page.get_by_role("region", name="What is stored").wait_for()
        case "adapt":
            page.get_by_label("Samples", exact=True).fill('{"input": "a", "output": "b"}\n{"input": "a"}')
        case "bank":
            page.locator(".person").wait_for()
        case "system":
            page.get_by_role("region", name="Training jobs").wait_for()
    return page


def _background(page: Page) -> list[int]:
    colour: str = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


class TestEverywhere:
    def test_the_key_goes_along_with_every_call_and_stays_in_the_tab(self, look: Looking) -> None:
        page = look.visit("users")
        page.get_by_label("API key").fill("mta_a-key")
        with page.expect_navigation():
            page.get_by_label("API key").press("Enter")
        sent: list[tuple[str, str | None]] = []
        page.on("request", lambda request: sent.append((request.url, request.headers.get("authorization"))))
        answered(look.visit("playground", user="rosa", ask=QUESTIONS[1], tokens=4))
        calls = {url.removeprefix(look.url): key for url, key in sent if "/console" not in url and look.url in url}
        assert {"/generate", "/bank", "/ready"} <= calls.keys()
        assert set(calls.values()) == {"Bearer mta_a-key"}
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]

    @each_place
    def test_axe_finds_nothing_serious_in_light_and_dark(self, look: Looking, place: str) -> None:
        page = _settled(look, place)
        found = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for violation in Axe().run(page).response["violations"]:
                nodes = [node["html"] for node in violation["nodes"]]
                found.append((scheme, violation["impact"], violation["id"], nodes))
        assert [one for one in found if one[1] in ("serious", "critical")] == []
        assert look.refusals == []

    @each_place
    def test_no_width_scrolls_sideways(self, look: Looking, place: str) -> None:
        page = _settled(look, place)
        too_wide = []
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(100)  # pictures are drawn anew
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                too_wide.append(width)
        assert too_wide == []

    def test_dark_is_dark_and_light_is_light(self, look: Looking) -> None:
        page = look.visit("users")
        page.emulate_media(color_scheme="light")
        assert min(_background(page)) > 200
        page.emulate_media(color_scheme="dark")
        assert max(_background(page)) < 60

    def test_the_keyboard_reaches_and_does_everything(self, look: Looking) -> None:
        page = look.visit("users")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("main")).to_be_focused()
        page.get_by_role("link", name="Playground").press("Enter")
        expect(page.get_by_role("heading", level=1, name="Playground")).to_be_focused()
        page.get_by_role("radio", name="A user by id").press("Space")
        page.get_by_label("User id").fill("rosa")
        page.get_by_label("Question").fill("Hello?")
        page.get_by_label("Question").press("Control+Enter")
        answered(page)

    def test_a_streamed_answer_is_announced_when_it_is_whole(self, look: Looking) -> None:
        page = look.visit("playground", user="rosa", ask=QUESTIONS[0], tokens=64)
        texts = page.locator(".answer .text")
        expect(texts.first).to_have_attribute("aria-live", "polite")
        expect(page.locator(".text[aria-busy=true]")).not_to_have_count(0)
        answered(page)
        expect(page.locator(".text[aria-busy=true]")).to_have_count(0)
