"""The page that adapts: samples in many forms, training to its end, and cancelling."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from deploy.console.browser import TRAINING_MS, Looking
from deploy.demo import adapting
from deploy.demo.personas import QUESTIONS

CSV = 'input,output\n"What, now?","A walk,\nthen ""tea""."\nAnd then?,Sleep.\nAnd after?,\n'
ENDED = re.compile("Succeeded|Rejected")


def _fill(page: Page, samples: str) -> None:
    page.get_by_label("Samples", exact=True).fill(samples)


class TestAdapt:
    def test_samples_are_trained_on_and_answers_shown_before_and_after(self, look: Looking) -> None:
        page = look.visit("adapt", user="kai")
        _fill(page, "\n".join(map(json.dumps, adapting.samples())))
        page.get_by_label("Questions to ask").fill(QUESTIONS[0])
        page.get_by_label("Steps at most").fill("4")
        page.get_by_role("button", name=f"Train on {adapting.SAMPLES} samples").click()
        training = page.get_by_role("region", name="Training")
        expect(training.get_by_role("status")).to_contain_text(ENDED, timeout=TRAINING_MS)
        expect(training.get_by_role("img", name=re.compile(r"Training loss from \d"))).to_be_visible()
        expect(training.locator("canvas")).to_have_count(1)
        expect(training).to_contain_text(re.compile(r"Held out, before\s*\d\.\d{3}"))
        versus = page.get_by_role("region", name="Before and after")
        expect(versus.get_by_text("merged from anchors")).not_to_have_count(0)
        if "Succeeded" in training.inner_text():
            expect(versus.get_by_text("with an adapter of their own")).to_have_count(1)
        link = page.url
        page.goto("about:blank")
        page.goto(link)  # the same job, found again
        expect(page.get_by_role("region", name="Training").get_by_role("status")).to_contain_text(ENDED)

    @pytest.mark.parametrize(
        ("samples", "found", "fault"),
        [
            (CSV, "2 samples", "row 4 has no output"),
            ('[{"input": "a", "output": "b"}]', "1 sample", ""),
            ('{"samples": [{"input": "a", "output": "b"}]}', "1 sample", ""),
            ('{"input": "a", "output": "b"}\n{"input"', "1 sample", "line 2 is not JSON"),
            ("question;answer\na;b", "0 samples", "neither JSON nor CSV"),
        ],
    )
    def test_samples_come_in_several_forms(self, look: Looking, samples: str, found: str, fault: str) -> None:
        page = look.visit("adapt")
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
