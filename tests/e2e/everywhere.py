"""What holds on every page: accessible, readable, understandable when parts fail; and what its modules compute."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect

from bench.rig.processes import wait_until
from demo.personas import QUESTIONS
from deploy.console.browser import Looking
from mta_client import Client
from tests.e2e.conftest import Demo
from tests.e2e.playground import answer, answered

PLACES: dict[str, dict[str, Any]] = {
    "playground": {"user": "rosa", "ask": QUESTIONS[1], "tokens": 24},
    "users": {"id": "rosa"},
    "adapt": {"user": "kai"},
    "bank": {"user": "rosa"},
    "worth": {},
    "system": {},
}
WIDTHS = (360, 375, 768, 1440, 2560)


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
        case "worth":
            page.get_by_text("Nothing is compared yet").wait_for()
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

    @pytest.mark.parametrize("place", PLACES)
    def test_axe_finds_nothing_serious_and_no_width_scrolls(self, look: Looking, place: str) -> None:
        page = _settled(look, place)
        found, too_wide = [], []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert min(_background(page)) > 200 if scheme == "light" else max(_background(page)) < 60
            for violation in Axe().run(page).response["violations"]:
                nodes = [node["html"] for node in violation["nodes"]]
                found.append((scheme, violation["impact"], violation["id"], nodes))
        assert [one for one in found if one[1] in ("serious", "critical")] == []
        assert look.refusals == []
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(100)  # pictures are drawn anew
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                too_wide.append(width)
        assert too_wide == []

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


RESTART_S = 240.0
BEGUN = 'data: {"choices": [{"delta": {"content": "It began"}, "finish_reason": null}]}\n\n'


class TestTrouble:
    @pytest.fixture
    def healed(self, demo: Demo, api: Client) -> Iterator[Demo]:
        """The server, ready again after the test."""
        yield demo
        wait_until(api.ready, "the engine's restart", RESTART_S)

    def test_an_engine_killed_in_the_middle_of_an_answer(self, look: Looking, healed: Demo, api: Client) -> None:
        engine = healed.engine()  # known at once when it matters: rosa's letter has its end after some fifty tokens
        page = look.visit("playground", user="rosa", ask="Tell me a very long story.", tokens=2000)
        expect(answer(page, "rosa").locator(".caret")).to_be_visible()
        os.kill(engine, signal.SIGKILL)
        for title in ("rosa", "Base model"):
            expect(answer(page, title).get_by_role("alert")).to_contain_text("The answer broke off.")
        expect(page.locator(".caret")).to_have_count(0)
        expect(page.locator("[aria-busy=true]")).to_have_count(0)
        expect(page.get_by_role("link", name="not ready")).to_be_visible()
        look.visit("system")
        expect(page.get_by_role("region", name="Parts")).to_contain_text("Not ready")
        wait_until(api.ready, "the engine's restart", RESTART_S)
        expect(page.get_by_role("region", name="Parts")).to_contain_text("Ready: requests are answered")
        look.visit("playground", user="rosa", ask="Hello?", tokens=4)
        answered(page)

    def test_a_gateway_that_does_not_answer(self, look: Looking) -> None:
        page = look.visit("users")
        page.route("**/users/*", lambda route: route.abort())
        page.get_by_label("User id").fill("rosa")
        page.get_by_role("button", name="Look up").click()
        expect(page.get_by_role("alert")).to_contain_text("The gateway does not answer")
        expect(page.get_by_text("Looking …")).to_have_count(0)
        page.unroute("**/users/*")
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("region", name="What is stored")).to_be_visible()

    def test_a_gateway_that_hangs_is_not_shown_as_it_was(self, look: Looking) -> None:
        page = look.visit("system")
        expect(page.get_by_role("region", name="Parts")).to_be_visible()
        page.route("**/ready", lambda route: None)
        expect(page.get_by_role("alert")).to_contain_text("The gateway does not answer")
        expect(page.get_by_role("region", name="Parts")).to_have_count(0)
        page.unroute("**/ready")
        expect(page.get_by_role("region", name="Parts")).to_be_visible()

    def test_a_key_that_no_header_can_carry_is_sent_to_be_refused(self, look: Looking) -> None:
        page = look.visit("users")
        page.evaluate("sessionStorage.setItem('key', 'mta_a\u200bkey')")
        page.reload()
        with page.expect_request("**/users/rosa") as sent:
            page.get_by_label("User id").fill("rosa")
            page.get_by_role("button", name="Look up").click()
        assert sent.value.headers["authorization"] == "Bearer mta_a%E2%80%8Bkey"

    def test_failed_erasure_stays_shown_without_a_retry_button(self, look: Looking) -> None:
        page = look.visit("users", id="rosa")
        page.get_by_role("button", name="Erase").click()
        page.route("**/users/*", lambda route: route.abort())
        page.get_by_role("group").get_by_role("button", name="Erase").click()
        expect(page.get_by_role("alert")).to_contain_text("The gateway does not answer")
        expect(page.get_by_role("button", name="Try again")).to_have_count(0)
        expect(page.get_by_role("button", name="Erase")).to_be_visible()

    def test_why_an_answer_is_the_base_models_is_said(self, look: Looking) -> None:
        page = look.visit("playground")
        who = {"level": "base", "anchors": [], "reason": "the engine cannot serve this user's recipe"}
        told = f"data: {json.dumps({'personalization': who})}\n\n{BEGUN}data: [DONE]\n\n"
        page.route("**/generate", lambda route: route.fulfill(body=told, content_type="text/event-stream"))
        page.get_by_role("radio", name="A user by id").check()
        page.get_by_label("User id").fill("rosa")
        page.get_by_label("Question").fill("Hello?")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(answer(page, "rosa")).to_contain_text("The engine cannot serve this user's recipe.")

    def test_a_stream_that_ends_without_its_end(self, look: Looking) -> None:
        page = look.visit("playground")

        def cut(route: Route) -> None:
            route.fulfill(body=BEGUN, content_type="text/event-stream")

        page.route("**/generate", cut)
        page.get_by_role("radio", name="A user by id").check()
        page.get_by_label("User id").fill("rosa")
        page.get_by_label("Question").fill("Hello?")
        page.get_by_role("button", name="Ask", exact=True).click()
        card = answer(page, "rosa")
        expect(card.get_by_role("alert")).to_contain_text(re.compile("broke off.*connection"))
        expect(card.locator(".text")).to_contain_text("It began")

    def test_a_refusal_is_shown_in_the_servers_words(self, look: Looking) -> None:
        page = look.visit("playground", user="rosa", ask="Hello?", tokens=4096, temperature=1.5, history=16)
        page.get_by_label("Question").fill("Hello? " * 20_000)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(answer(page, "rosa").get_by_role("alert")).to_contain_text(re.compile("prompt|tokens"))


BEFORE = """# HELP tokens_seconds Between tokens.
tokens_seconds_bucket{le="0.1",level="merged"} 10
tokens_seconds_bucket{le="0.2",level="merged"} 10
tokens_seconds_bucket{le="+Inf",level="merged"} 10
asked_total{route="/a \\"b\\"",level="x"} 7
asked_total{route="/c",level=""} 100
"""
AFTER = """tokens_seconds_bucket{le="0.1",level="merged"} 60
tokens_seconds_bucket{le="0.2",level="merged"} 109
tokens_seconds_bucket{le="+Inf",level="merged"} 110
asked_total{route="/a \\"b\\"",level="x"} 9
asked_total{route="/c",level=""} 3
"""


Reading = Callable[..., Any]


class TestReading:
    @pytest.fixture
    def reading(self, look: Looking) -> Reading:
        """What an expression over a module of the console (`m`) and values (`v`) gives."""
        look.visit("users")

        def run(module: str, does: str, *values: object) -> Any:
            script = f"async ([path, v]) => {{ const m = await import(path); return {does}; }}"
            return look.page.evaluate(script, [f"/console/reading/{module}.js", list(values)])

        return run

    def test_a_quantile_is_of_what_was_observed_in_between(self, reading: Reading) -> None:
        does = "m.quantile(m.parseMetrics(v[0]), m.parseMetrics(v[1]), 'tokens_seconds', v[2])"
        for q, seconds in ((0.5, 0.1), (0.25, 0.05), (0.99, 0.2), (1.0, 0.2)):
            assert reading("metrics", does, BEFORE, AFTER, q) == pytest.approx(seconds)
            assert reading("metrics", does, AFTER, AFTER, q) is None

    def test_growth_counts_from_zero_after_a_counter_restart(self, reading: Reading) -> None:
        does = """['x', ''].map((level) =>
            m.growth(m.parseMetrics(v[0]), m.parseMetrics(v[1]), 'asked_total', (labels) => labels.level === level))"""
        assert reading("metrics", does, BEFORE, AFTER) == [2, 3]
        assert reading("metrics", "m.growth(m.parseMetrics(''), m.parseMetrics(''), 'asked_total')") is None

    def test_growth_ignores_the_total_of_an_engine_that_returns(self, reading: Reading) -> None:
        does = "m.growth(m.parseMetrics(v[0]), m.parseMetrics(v[1]), 'x_total')"
        both, other = 'x_total{engine="0"} 10\nx_total{engine="1"} 20', 'x_total{engine="1"} 25'
        later = both.replace("20", "30")
        assert [reading("metrics", does, *pair) for pair in ((both, other), (other, later), (both, later))] == [
            5,
            5,
            10,
        ]

    def test_snippets_disable_learning_and_set_the_history(self, reading: Reading) -> None:
        question = {"user": "rosa", "prompt": "Rain?", "maxTokens": 9, "temperature": 0, "history": 0, "strength": 1}
        body = reading("snippets", "m.asBody(v[0])", question)
        assert (body["learn"], body["history"], "strength" in body) == (False, 0, False)
        code = reading("snippets", "m.asPython(v[0])", question)
        assert 'extra_body={"history": 0, "learn": False}' in code and "    temperature=0,\n" in code

    def test_what_is_left_to_the_server_is_not_sent(self, reading: Reading) -> None:
        question = {"user": "rosa", "prompt": "Rain?", "maxTokens": None, "temperature": None, "history": 0}
        assert not {"max_tokens", "temperature"} & reading("snippets", "m.asBody(v[0])", question).keys()
        assert "=null" not in reading("snippets", "m.asPython(v[0])", question | {"strength": 1})

    def test_words_that_the_other_text_lacks_are_marked(self, reading: Reading) -> None:
        for left, right, marked in (
            ("the cat sat", "the dog sat", (["cat"], ["dog"])),
            ("one two", "two one", ([], [])),
            ("a\n\nb c", "b c", (["a"], [])),
            ("x\ny and so on", "z, and so on", (["x", "y"], ["z,"])),
            ("Same words.", "same words –", ([], [])),
        ):
            sides = reading("diff", "m.compared(v[0], v[1])", left, right)
            assert ["".join(text for text, _ in side) for side in sides] == [left, right]
            assert tuple([text for text, differs in side if differs] for side in sides) == marked

    def test_texts_with_little_in_common_have_no_marks(self, reading: Reading) -> None:
        assert reading("diff", "m.compared(v[0], v[1])", "all of it is new", "nothing here but other words") == []
