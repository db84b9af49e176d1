"""The page of the bank: the map, a user on it, and the rule."""

from __future__ import annotations

import httpx
from playwright.sync_api import expect

from bench.rig.up import Up
from deploy.console.browser import Looking


class TestBank:
    def test_the_map_shows_every_anchor_and_a_user_among_those_who_speak(self, look: Looking, machine: Up) -> None:
        told = httpx.get(f"{machine.url}/bank").raise_for_status().json()
        page = look.visit("bank")
        atlas = page.get_by_role("region", name="Map of the anchors")
        expect(atlas.locator(".anchor")).to_have_count(len(told["anchors"]))
        page.get_by_label("Show a user").fill("rosa")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(atlas.locator("line")).to_have_count(2)
        expect(atlas.locator(".speaks")).to_have_count(2)
        expect(atlas.locator(".person")).to_have_count(1)
        speaking = [anchor["id"] for anchor in httpx.get(f"{machine.url}/users/rosa").json()["anchors"]]
        drawn = atlas.get_by_role("img").get_attribute("aria-label") or ""
        assert all(name in drawn for name in ("rosa", *speaking))
        assert page.url.endswith("#/bank?user=rosa")

    def test_the_rule_is_said_in_words_and_each_anchor_has_its_items(self, look: Looking, machine: Up) -> None:
        told = httpx.get(f"{machine.url}/bank").raise_for_status().json()
        page = look.visit("bank")
        expect(page.get_by_role("region", name="The rule of weights")).to_contain_text(told["rule"]["says"])
        rows = page.get_by_role("region", name="Anchors", exact=True).locator("tbody tr")
        expect(rows).to_have_count(len(told["anchors"]))
        expect(rows.first).to_contain_text(str(told["anchors"][0]["items"]))
        expect(page.get_by_role("region", name="About the bank")).to_contain_text(told["bank"])
