"""The page of users: looking up, adding, erasing, and ids and texts that mean harm."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from deploy.console.browser import Looking
from mta_client import Client, MtaError
from tests.e2e.console.playground import answer, answered

HOSTILE = "<img_src=x_onerror=alert(1)>"
MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>alert(2)</script>"
MOST_ITEMS = 512


class TestUsers:
    def test_a_user_is_found_by_the_exact_id(self, look: Looking) -> None:
        page = look.visit("users")
        page.get_by_label("User id").fill("rosa")
        page.get_by_role("button", name="Look up").click()
        stored = page.get_by_role("region", name="What is stored")
        expect(stored).to_contain_text("4 items")
        expect(stored).to_contain_text("mta1:")
        speaking = page.get_by_role("region", name="Anchors that speak")
        expect(speaking.get_by_role("listitem")).to_have_count(2)
        expect(speaking).to_contain_text("by topic")
        expect(speaking).to_contain_text("similarity")
        expect(page.get_by_role("region", name="Adapter", exact=True)).to_contain_text("None")
        assert page.url.endswith("#/users?id=rosa")

    def test_somebody_new_becomes_known_and_is_erased(self, look: Looking, api: Client) -> None:
        page = look.visit("users", id="newcomer")
        expect(page.get_by_text("Nothing is stored about")).to_be_visible()
        page.get_by_label("What they have written").fill("The tide was out.\nThe tide came in.")
        page.get_by_role("button", name="Add 2 items").click()
        expect(page.get_by_text("2 items changed, 2 items kept.")).to_be_visible()
        expect(page.get_by_role("region", name="What is stored")).to_contain_text("2 items")
        page.get_by_role("button", name="Erase").click()
        page.get_by_role("button", name="Keep").click()
        page.get_by_role("button", name="Erase").click()
        page.get_by_role("button", name="Erase").click()
        expect(page.get_by_text("Erased newcomer: 2 items")).to_be_visible()
        with pytest.raises(MtaError):
            api.user("newcomer")

    def test_what_people_write_is_text_and_never_markup(self, look: Looking, api: Client) -> None:
        api.put_profile(HOSTILE, [MARKUP, "A quiet day by the sea."])
        page = look.visit("users", id=HOSTILE)
        expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
        page.get_by_label("What they have written").fill(MARKUP)
        page.get_by_role("button", name="Add").click()
        expect(page.get_by_text("items kept.")).to_be_visible()
        look.visit("bank", user=HOSTILE)
        expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
        look.visit("adapt", user=HOSTILE)
        page.get_by_label("Samples", exact=True).fill(
            '{"input": "<b>Who?</b>", "output": "<img src=x onerror=alert(3)>"}'
        )
        expect(page.get_by_text("<img src=x onerror=alert(3)>", exact=True)).to_have_count(1)  # the sample, shown
        look.visit("playground", user=HOSTILE, ask=f"Repeat after me: {MARKUP}", tokens=24)
        answered(page)
        expect(answer(page, HOSTILE)).to_contain_text("merged from anchors")
        assert page.locator("img").count() == 0
        assert page.title() == "Playground · MTA console"

    def test_512_items_are_shown_as_quickly_said_as_four(self, look: Looking, api: Client) -> None:
        lines = "\n".join(f"Line {n}: the garden at hour {n}." for n in range(MOST_ITEMS))
        page = look.visit("users", id="prolific")
        page.get_by_label("What they have written").fill(lines)
        page.get_by_role("button", name=f"Add {MOST_ITEMS} items").click()
        expect(page.get_by_role("region", name="What is stored")).to_contain_text(f"{MOST_ITEMS} items")
        assert api.user("prolific").items == MOST_ITEMS
        look.visit("playground", user="prolific", ask="What grows?", tokens=8)
        answered(page)
