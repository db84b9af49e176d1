"""The pages of users, of adapting, of the bank and of the system, each by what a person does there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from demo import adapting
from demo.personas import QUESTIONS
from deploy.console.browser import TRAINING_MS, Looking
from mta_client import Client, MtaError
from tests.e2e.conftest import Demo
from tests.e2e.playground import answer, answered

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
        expect(stored).to_contain_text("mta3:")
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
        listed = page.get_by_role("region", name="Items", exact=True)
        expect(listed.get_by_role("listitem")).to_have_count(2)
        expect(listed).to_contain_text(re.compile(r"The tide came in\.\s*too short"))
        expect(page.get_by_role("region", name="What is stored")).to_contain_text("2 items")
        page.get_by_role("button", name="Erase").click()
        page.get_by_role("button", name="Keep").click()
        page.get_by_role("button", name="Erase").click()
        page.get_by_role("button", name="Erase").click()
        expect(page.get_by_text("Erased newcomer: 2 items")).to_be_visible()
        with pytest.raises(MtaError):
            api.user("newcomer")

    def test_an_earlier_version_of_an_adapter_serves_again(self, look: Looking) -> None:
        told = httpx.get(f"{look.url}/users/kai").raise_for_status().json()
        kept = {"recipe": told["recipe"], "bytes": 4096, "created_at": told["updated_at"], "stale": False, "samples": 8}
        newest, first = (
            {"version": number, "id": f"adapter{number}", "before": 2.0, "after": after, "serving": number == 2} | kept
            for number, after in ((2, 1.25), (1, 1.5))
        )
        asked = []
        page = look.visit("users")
        page.route("**/users/kai", lambda route: route.fulfill(json=told | {"adapter": newest}))
        page.route("**/users/kai/adapters", lambda route: route.fulfill(json={"adapters": [newest, first]}))
        page.route("**/serve", lambda route: (asked.append(route.request.url), route.fulfill(json=first)))
        page.get_by_label("User id").fill("kai")
        page.get_by_role("button", name="Look up").click()
        adapters = page.get_by_role("region", name="Adapter", exact=True)
        expect(adapters.get_by_role("region", name="Version 2")).to_contain_text(re.compile("serving.*2.000 → 1.250"))
        adapters.get_by_role("region", name="Version 1").get_by_role("button", name="Serve this one").click()
        expect(page.get_by_role("button", name="Serve this one")).to_have_count(1)
        assert asked == [f"{look.url}/users/kai/adapters/1/serve"]

    def test_address_shows_the_user_it_names_after_another_lookup(self, look: Looking) -> None:
        page = look.visit("users", id="rosa")
        page.get_by_label("User id").fill("kai")
        page.get_by_role("button", name="Look up").click()
        expect(page.get_by_role("heading", name="kai")).to_be_visible()
        page.evaluate("location.hash = '#/users?id=rosa'")
        expect(page.get_by_role("heading", name="rosa")).to_be_visible()

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


CSV = 'input,output\n"What, now?","A walk,\nthen ""tea""."\nAnd then?,Sleep.\nAnd after?,\n'
ENDED = re.compile("Succeeded|Rejected")


def _fill(page: Page, samples: str) -> None:
    page.get_by_label("Samples", exact=True).fill(samples)


class TestAdapt:
    def test_page_trains_on_samples_and_shows_before_and_after(self, look: Looking) -> None:
        page = look.visit("adapt", user="kai")
        _fill(page, "\n".join(map(json.dumps, adapting.samples())))
        page.get_by_label("Questions to ask").fill(QUESTIONS[0])
        page.get_by_label("Steps at most").fill("4")
        page.get_by_role("button", name=f"Train on {adapting.SAMPLES} samples").click()
        training = page.get_by_role("region", name="Training")
        expect(training.get_by_role("status")).to_contain_text(ENDED, timeout=TRAINING_MS)
        expect(training.get_by_role("img", name=re.compile(r"Training loss from \d"))).to_be_visible()
        expect(training.locator("polyline")).to_have_count(3)  # two folds and all samples
        expect(training.get_by_text("A sample that neither answer has been trained on")).to_be_visible()
        expect(training).to_contain_text(re.compile(r"Held out, before\s*\d\.\d{3}"))
        versus = page.get_by_role("region", name="Before and after")
        expect(versus.get_by_text("merged from anchors")).not_to_have_count(0)
        if "Succeeded" in training.inner_text():
            expect(versus.get_by_text("with an adapter of their own")).to_have_count(1)
        link = page.url
        page.goto("about:blank")
        page.goto(link)  # the same job, found again
        expect(page.get_by_role("region", name="Training").get_by_role("status")).to_contain_text(ENDED)

    def test_samples_come_in_several_forms(self, look: Looking) -> None:
        page = look.visit("adapt")
        for samples, found, fault in (
            (CSV, "2 samples", "row 4 has no output"),
            ('[{"input": "a", "output": "b"}]', "1 sample", ""),
            ('{"input": "a", "output": "b"}\n{"input"', "1 sample", "line 2 is not JSON"),
            ("question;answer\na;b", "0 samples", "neither JSON nor CSV"),
            ('{"samples": [{"input": "a", "output": "b"}]}', "1 sample", ""),
        ):
            _fill(page, samples)
            expect(page.get_by_role("button", name=f"Train on {found}", exact=True)).to_be_visible()
            if fault:
                expect(page.get_by_text(fault)).to_be_visible()

    def test_a_file_can_be_chosen_or_dropped(self, look: Looking, tmp_path: Path) -> None:
        page = look.visit("adapt")
        chosen = tmp_path / "samples.csv"
        chosen.write_text(CSV)
        page.get_by_label("Or choose a file").set_input_files(chosen)
        expect(page.get_by_role("button", name="Train on 2 samples")).to_be_enabled()
        dropped = page.evaluate_handle(
            """() => { const data = new DataTransfer();
            data.items.add(new File(['{"input": "a", "output": "b"}'], 'one.ndjson')); return data; }"""
        )
        page.locator(".drop").dispatch_event("drop", {"dataTransfer": dropped})
        expect(page.get_by_role("button", name="Train on 1 sample", exact=True)).to_be_enabled()

    def test_training_can_be_cancelled(self, look: Looking) -> None:
        page = look.visit("adapt", user="morgan")
        _fill(page, "\n".join(map(json.dumps, adapting.samples())))
        page.get_by_label("Steps at most").fill("500")
        page.get_by_role("button", name="Train on").click()
        page.get_by_role("button", name="Cancel training").click()
        expect(page.get_by_role("region", name="Training").get_by_role("status")).to_contain_text("Cancelled")
        expect(page.get_by_role("button", name="Cancel training")).to_have_count(0)
        expect(page.get_by_role("button", name="Train on")).to_be_enabled()

    def test_a_job_that_is_not_there_is_said_to_be_so(self, look: Looking) -> None:
        page = look.visit("adapt", job="aaaaaaaaaaaaaaaaaaaaaaaaaa.1")
        expect(page.get_by_role("alert")).to_contain_text(re.compile("job", re.I))


class TestBank:
    def test_page_shows_the_rule_all_anchors_and_a_user_on_the_map(self, look: Looking, demo: Demo) -> None:
        told = httpx.get(f"{demo.url}/bank").raise_for_status().json()
        page = look.visit("bank")
        expect(page.get_by_role("region", name="The rule of weights")).to_contain_text(told["rule"]["says"])
        expect(page.get_by_role("region", name="About the bank")).to_contain_text(told["bank"])
        rows = page.get_by_role("region", name="Anchors", exact=True).locator("tbody tr")
        expect(rows).to_have_count(len(told["anchors"]))
        expect(rows.first).to_contain_text(str(told["anchors"][0]["items"]))
        projection = page.get_by_role("region", name="Map of the anchors")
        expect(projection.locator(".anchor")).to_have_count(len(told["anchors"]))
        page.get_by_label("Show a user").fill("rosa")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(projection.locator("line")).to_have_count(2)
        expect(projection.locator(".speaks")).to_have_count(2)
        expect(projection.locator(".person")).to_have_count(1)
        speaking = [anchor["id"] for anchor in httpx.get(f"{demo.url}/users/rosa").json()["anchors"]]
        drawn = projection.get_by_role("img").get_attribute("aria-label") or ""
        assert all(name in drawn for name in ("rosa", *speaking))
        assert page.url.endswith("#/bank?user=rosa")

    def test_a_page_opened_later_shows_the_bank_that_is_served_then(self, look: Looking) -> None:
        page = look.visit("bank")
        about = page.get_by_role("region", name="About the bank")
        expect(about).to_be_visible()
        told = httpx.get(f"{look.url}/bank").raise_for_status().json() | {"bank": "0ther000"}
        page.route("**/bank", lambda route: route.fulfill(json=told))
        page.get_by_role("link", name="Users").click()
        page.get_by_role("link", name="Bank").click()
        expect(about).to_contain_text("0ther000")


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
        page.wait_for_timeout(2500)
        assert not [url for url in asked if url.endswith("/metrics")]
        page.get_by_role("button", name="Go on").click()
        with page.expect_request("**/metrics"):
            pass
