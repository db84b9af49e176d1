"""The console's page on what personalisation is worth, in Chromium over a gateway whose weeks are made up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from bench.rig.valkey import ValkeyProcess
from deploy.console.browser import Looking, looking
from server.clock import week_of
from server.gateway.experiments.tallies import sums_of
from server.settings import Settings
from server.store.tallies import Cell, Counts
from tests.support.gateway import GatewayThread
from tests.support.store_parts import StoreParts

TENANT = "worth"
WIDTHS = (360, 768, 1440, 2560)


def tallies(week: int, level: str, arm: str, people: int, changed: float) -> Iterator[dict[Cell, Counts]]:
    """People with 4 answers each and feedback on all of them."""
    for number in range(people):
        share = min(1.0, changed * (number % 5) / 2)
        told = Counts(4, 200, 10_000, 4, sent=1, edited=2, discarded=1, measured=4, changed=4 * share)
        yield {Cell(week, 0, level, arm): told}


async def make_up(url: str) -> None:
    week = week_of(int(time.time()) // 3600)
    async with StoreParts.opened(url) as parts:
        for before in range(3, 0, -1):
            for level, lower in (("stacked", 40), ("merged", 8)):
                arms = (("lower", lower, 0.6), ("full", 300, 0.3))
                taken = [tally for arm in arms for tally in tallies(week - before, level, *arm)]
                await parts.tallies.add_sums(TENANT, f"{level} {before}", sums_of(taken))
        await parts.tallies.add_people(week, TENANT, map(str, range(412)))


@pytest.fixture(scope="module")
def gateway(gateway_settings: Settings, store: ValkeyProcess) -> Iterator[GatewayThread]:
    asyncio.run(make_up(store.url))
    with GatewayThread(gateway_settings, redis_url=store.url, tenant=TENANT) as started:
        yield started


@pytest.fixture
def look(gateway: GatewayThread, browser: Browser) -> Iterator[Looking]:
    with looking(browser, gateway.url) as looker:
        yield looker
        assert looker.faults == looker.foreign == looker.refusals == []


def test_results_are_sentences_and_intervals(look: Looking) -> None:
    page = look.visit("worth")
    results = page.get_by_role("region", name="Results")
    expect(results).to_contain_text("Stacked saves 46 %")
    expect(results).to_contain_text("of what people change: keep it.")
    expect(results).to_contain_text("412 people so far")
    stacked = page.get_by_role("region", name="Comparisons of stacked")
    sure = stacked.locator(".interval.sure")
    expect(sure).to_have_count(1)
    assert (sure.get_attribute("aria-label") or "").startswith("26 points less text changed, from ")
    expect(page.get_by_role("region", name="Comparisons of merged")).to_contain_text("too few people yet")
    rows = page.get_by_role("region", name="Weeks").locator("tbody tr")
    expect(rows).to_have_count(12)
    expect(rows.first).to_contain_text("300")


def test_axe_finds_nothing_and_no_width_scrolls_sideways(look: Looking) -> None:
    page = look.visit("worth")
    page.get_by_role("region", name="Results").wait_for()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert [violation["id"] for violation in Axe().run(page).response["violations"]] == []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth"), width
