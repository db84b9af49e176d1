"""The page of the system: parts, and figures that move."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from deploy.console.browser import Looking
from mta_client import Client

MILLISECONDS = re.compile(r"\d ms|\d s")


class TestSystem:
    def test_every_part_is_shown_with_its_state(self, look: Looking) -> None:
        page = look.visit("system")
        parts = page.get_by_role("region", name="Parts")
        expect(parts.get_by_role("listitem")).to_have_count(5)
        for part in ("Bank ok", "Embedder ok", "Store ok", "Generating address ok", "Engine ok"):
            expect(parts).to_contain_text(part)

    def test_an_answer_shows_in_the_figures(self, look: Looking, api: Client) -> None:
        page = look.visit("system")
        expect(page.get_by_role("region", name="Requests")).to_contain_text("0 a second")
        api.generate("rosa", "Hello?", max_tokens=2)  # no stream: it has no first token
        list(api.stream("rosa", "What should I read?", max_tokens=12, temperature=0))
        for tile in ("First token", "Between tokens"):
            expect(page.get_by_role("region", name=tile)).to_contain_text(MILLISECONDS)
        expect(page.get_by_role("region", name="Answers")).not_to_contain_text("0 a second")
        expect(page.get_by_role("region", name="Adapter slots")).to_contain_text(re.compile(r"\d+ of \d+ resident"))
        expect(page.get_by_role("region", name="Adapters asked for")).to_contain_text(
            re.compile(r"\d+ warm\s*\d+ cold")
        )
        expect(page.get_by_role("region", name="Training jobs")).to_contain_text(
            re.compile(r"\d+ queued\s*\d+ running")
        )

    def test_it_can_be_paused(self, look: Looking) -> None:
        page = look.visit("system")
        page.get_by_role("region", name="Parts").wait_for()
        page.get_by_role("button", name="Pause").click()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(4500)
        assert not [url for url in asked if url.endswith("/metrics")]
        page.get_by_role("button", name="Go on").click()
        with page.expect_request("**/metrics"):
            pass
