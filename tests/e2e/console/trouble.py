"""What people see when parts fail: a sentence, and never a wait without end."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest
from playwright.sync_api import Route, expect

from bench.rig.processes import wait_until
from bench.rig.up import Up
from deploy.console.browser import Looking
from tests.e2e.console.playground import answer, answered

RESTART_S = 240.0
BEGUN = 'data: {"choices": [{"delta": {"content": "It began"}, "finish_reason": null}]}\n\n'


class TestTrouble:
    @pytest.fixture
    def healed(self, machine: Up) -> Iterator[Up]:
        """The server, ready again after the test."""
        yield machine
        wait_until(machine.ready, "the engine's restart", RESTART_S)

    def test_an_engine_killed_in_the_middle_of_an_answer(self, look: Looking, healed: Up) -> None:
        page = look.visit("playground", user="rosa", ask="Tell me a very long story.", tokens=2000)
        expect(answer(page, "rosa").locator(".caret")).to_be_visible()
        engine = healed.part("engine")
        assert engine
        os.kill(engine, signal.SIGKILL)
        for title in ("rosa", "Base model"):
            expect(answer(page, title).get_by_role("alert")).to_contain_text("The answer broke off.")
        expect(page.locator(".caret")).to_have_count(0)
        expect(page.locator("[aria-busy=true]")).to_have_count(0)
        expect(page.get_by_role("link", name="not ready")).to_be_visible()
        look.visit("system")
        expect(page.get_by_role("region", name="Parts")).to_contain_text("Not ready")
        wait_until(healed.ready, "the engine's restart", RESTART_S)
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
