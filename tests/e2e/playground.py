"""The playground: two answers to one question."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from demo.personas import QUESTIONS
from deploy.console.browser import Looking, looking
from mta_client import Client, MtaError
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready


def answer(page: Page, title: str) -> Locator:
    """The card of an answer."""
    return page.get_by_role("region", name=title, exact=True)


def ask(page: Page, question: str) -> None:
    """Ask, and wait until both answers are complete."""
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    answered(page)


def answered(page: Page) -> None:
    """Return once both answers are complete, by what they took."""
    expect(page.get_by_text("tokens/s")).to_have_count(2)


def text_of(card: Locator) -> str:
    """The text of an answer."""
    return card.locator(".text").inner_text()


def copied(page: Page, button: str) -> str:
    """What a button puts into the clipboard."""
    pressed = page.get_by_role("button", name=button)
    pressed.click()
    expect(pressed.locator("..").get_by_role("status")).to_have_text("copied")
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def streamed(*pieces: tuple[str, int]) -> str:
    """A stream of texts, each with the number of its tokens that a phrase had proposed."""
    chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}], "moved": n} for text, n in pieces]
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}], "moved": sum(n for _, n in pieces)}
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in (*chunks, end)) + "data: [DONE]\n\n"


class TestPlayground:
    def test_pasted_writing_is_answered_beside_base_and_erased(self, look: Looking, api: Client) -> None:
        page = look.visit("playground", tokens=48, temperature=0)
        page.get_by_role("button", name="Use an example").click()
        expect(page.get_by_label("Question")).not_to_have_value("")
        ask(page, QUESTIONS[0])
        base, personal = answer(page, "Base model"), answer(page, "Personal")
        assert text_of(base) != text_of(personal)
        expect(
            page.get_by_text(re.compile("words are not in the other answer|too few words in common"))
        ).to_be_visible()
        expect(base).to_contain_text("base model")
        expect(personal).to_contain_text("merged from anchors")
        expect(personal.get_by_role("listitem")).to_have_count(2)
        expect(personal).to_contain_text(re.compile(r"First token\s*\d+"))
        expect(personal).to_contain_text(re.compile(r"\d+ in, \d+ out"))
        kept = re.search(r"console-[0-9a-f]{10}", page.locator(".kept").inner_text())
        assert kept and api.user(kept[0]).items == 3
        page.get_by_role("button", name="Erase").click()
        page.get_by_role("button", name="Erase").click()
        expect(page.get_by_text(f"Erased {kept[0]}: 3 items")).to_be_visible()
        with pytest.raises(MtaError):
            api.user(kept[0])

    def test_a_permalink_asks_the_same_again(self, look: Looking) -> None:
        asked = list[str]()
        look.page.on("request", lambda sent: asked.append(sent.post_data or "") if "/generate" in sent.url else None)
        page = look.visit("playground", user="rosa", ask=QUESTIONS[3], tokens=24, temperature=0)
        answered(page)
        first, link = sorted(asked), copied(page, "Copy link")
        asked.clear()
        page.goto("about:blank")
        page.goto(link)
        answered(page)
        assert page.get_by_label("Question").input_value() == QUESTIONS[3]
        assert sorted(asked) == first  # not the answers: in bfloat16 they depend on what the cache holds
        assert len(first) == 2  # as the base model and as rosa

    def test_the_question_as_code_runs(self, look: Looking) -> None:
        page = look.visit("playground", user="rosa", ask='What\'s a "good" day?', tokens=8)
        answered(page)
        curl, python = copied(page, "Copy as curl"), copied(page, "Copy as Python")
        told = json.loads(subprocess.run(curl, shell=True, capture_output=True, check=True, timeout=120).stdout)
        assert told["personalization"]["level"] == "merged"
        said = subprocess.run([sys.executable, "-c", python], capture_output=True, check=True, timeout=120, text=True)
        assert said.stdout.strip().splitlines()[-1].startswith("merged mta3:")

    def test_a_setting_that_keeps_ask_from_asking_is_shown(self, look: Looking) -> None:
        page = look.visit("playground", user="rosa", ask="Hello?", tokens=8, temperature=0.75)
        answered(page)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_label("Temperature")).to_be_focused()

    def test_what_a_users_phrases_proposed_is_underlined_and_counted(self, look: Looking) -> None:
        def answer_both(route: Route) -> None:
            own = (("With", 1), (" love", 1), (" always", 0)) if '"auto"' in (route.request.post_data or "") else ()
            route.fulfill(body=streamed(("Rest.\n", 0), *own), content_type="text/event-stream")

        look.page.route("**/generate", answer_both)
        page = look.visit("playground", user="rosa", ask="Rain?")
        personal = answer(page, "rosa")
        expect(personal.locator("mark")).to_have_text("With love always")
        expect(personal.locator("mark u")).to_have_text("With love")
        expect(personal).to_contain_text(re.compile(r"own words\s*2 tokens"))
        expect(answer(page, "Base model").locator("u")).to_have_count(0)

    def test_own_words_can_be_switched_off(self, look: Looking) -> None:
        page = look.visit("playground", user="rosa", ask="Hello?", tokens=4)
        answered(page)
        page.get_by_text("Settings", exact=True).click()
        page.get_by_role("radio", name="Off", exact=True).check()
        with page.expect_request(lambda request: '"auto"' in (request.post_data or "")) as sent:
            page.get_by_role("button", name="Ask", exact=True).click()
        assert sent.value.post_data_json["words"] is False
        assert "words=false" in page.url
        assert '"words": False' in copied(page, "Copy as Python")

    def test_unknown_user_gets_a_base_answer_and_a_notice(self, look: Looking) -> None:
        page = look.visit("playground", user="nobody-at-all", ask="Hello?", tokens=8)
        answered(page)
        expect(answer(page, "nobody-at-all")).to_contain_text("Nothing is stored about this user")


class TestStrength:
    """With an engine that shows what it was asked for."""

    @pytest.fixture
    def beside(
        self, browser: Browser, gateway: GatewayThread, fake_engine: FakeEngine, ada: str
    ) -> Iterator[tuple[Looking, str]]:
        with gateway.client() as client:
            wait_until_ready(client)
        with looking(browser, gateway.url) as looker:
            yield looker, ada
            assert looker.faults == []

    def test_slider_is_disabled_with_reason_without_common_row(
        self, beside: tuple[Looking, str], gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bank = gateway.parts.bank
        monkeypatch.setattr(bank, "manifest", bank.manifest.model_copy(update={"common": False}))
        page = beside[0].visit("playground")
        expect(page.get_by_role("slider")).to_be_disabled()
        expect(page.get_by_text("This bank has no common row")).to_be_visible()

    def test_another_strength_asks_the_personal_side_again(
        self, beside: tuple[Looking, str], fake_engine: FakeEngine
    ) -> None:
        looker, user = beside
        page = looker.visit("playground", user=user, ask="Hello?", tokens=4)
        answered(page)
        models = [seen.body["model"] for seen in fake_engine.seen]
        page.get_by_role("slider").press("Home")
        expect(answer(page, user)).to_contain_text("No anchor speaks")
        answered(page)
        again = [seen.body["model"] for seen in fake_engine.seen][len(models) :]
        assert len(again) == 1
        assert again[0].endswith(":c")
        assert "strength=0" in page.url


class TestDrafts:
    def test_a_draft_stands_beside_its_rewriting(
        self, browser: Browser, rewriting: GatewayThread, fake_engine: FakeEngine
    ) -> None:
        with rewriting.client() as client:
            wait_until_ready(client)
        with looking(browser, rewriting.url) as looker:
            page = looker.visit("playground", tokens=4)
            page.get_by_role("button", name="Use an example").click()
            page.get_by_role("textbox", name="Draft").fill("We meet Bob at 10:30.")
            page.get_by_role("button", name="Rewrite").click()
            expect(page.get_by_text("tokens/s")).to_have_count(1)
            assert text_of(answer(page, "Draft")) == "We meet Bob at 10:30."
            expect(answer(page, "Personal")).to_contain_text("Kept of the draft: 0 of 1 numbers, 0 of 1 names.")
            expect(answer(page, "Personal")).to_contain_text("Missing: 10:30, Bob.")
            assert [seen.body["messages"][-1]["content"][:5] for seen in fake_engine.seen] == ["Write"]
            assert 'rewrite": True' in copied(page, "Copy as Python")
            assert "/rewrite -H" in copied(page, "Copy as curl")
            link = copied(page, "Copy link")
            page.goto("about:blank")
            page.goto(link)  # the same draft, rewritten again
            expect(answer(page, "Draft")).to_contain_text("We meet Bob at 10:30.")
            expect(page.get_by_text("Kept of the draft")).to_have_count(1)
            assert len(turns := [seen.body["messages"][-1]["content"] for seen in fake_engine.seen]) == 2
            assert turns[0] == turns[1]
            assert looker.faults == []
