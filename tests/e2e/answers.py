"""What the demo promises shows in what its server answers: the manners of its anchors, and a habit that no anchor has
once somebody has sent a few samples of it. The real model, bank and processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from demo import adapting
from demo.answers import MAX_TOKENS, DemoAnswer, ask
from demo.manners import MANNERS
from demo.personas import NOBODY, PEOPLE, QUESTIONS, Persona
from mta_client import Client
from tests.e2e.conftest import ROOT, Demo

AT_LEAST_AS_SOMEBODY = 4
AT_MOST_AS_NOBODY = 1
AT_LEAST_AFTER_ADAPTING = 3
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}

each_person = pytest.mark.parametrize("person", PEOPLE, ids=lambda person: person.user_id)


class TestAnswers:
    def test_the_table_shows_everybodys_answers_and_the_training(self, demo: Demo) -> None:
        _, _, table = demo.shown.partition("Asked by")
        people = (NOBODY, *(person.user_id for person in PEOPLE))
        for shown in (*people, "First token", " ms ", "a0", "before and after", "curl -s", "/console"):
            assert shown in table

    @each_person
    def test_the_manner_shows_in_a_persons_answers(self, person: Persona, answers: dict[str, list[DemoAnswer]]) -> None:
        texts = [answer.text for answer in answers[person.user_id]]
        assert sum(map(person.manner.shows, texts)) >= AT_LEAST_AS_SOMEBODY, texts

    def test_unknown_user_gets_base_answers_without_any_manner(self, answers: dict[str, list[DemoAnswer]]) -> None:
        texts = [answer.text for answer in answers[NOBODY]]
        for manner in MANNERS:
            assert sum(map(manner.shows, texts)) <= AT_MOST_AS_NOBODY, texts
        assert {(answer.level, answer.anchors) for answer in answers[NOBODY]} == {("base", ())}

    def test_requests_without_a_temperature_get_the_models(self, api: Client) -> None:
        (engine,) = api.health()["parts"]["engines"]
        assert engine["sampling"] == {"temperature": 0.2, "top_p": 0.9}

    @each_person
    def test_a_person_signs_with_their_own_name(self, person: Persona, answers: dict[str, list[DemoAnswer]]) -> None:
        found = answers[person.user_id]
        signed = [person.user_id in answer.text.lower() and answer.moved > 1 for answer in found]
        assert sum(signed) >= AT_LEAST_AS_SOMEBODY

    @pytest.mark.parametrize("user_id", ["morgan", "rosa"])  # kai's adapter has learnt his name as well
    def test_nobody_signs_with_their_name_without_their_phrases(self, api: Client, user_id: str) -> None:
        answer = api.generate(user_id, QUESTIONS[0], words=False, max_tokens=MAX_TOKENS, temperature=0)
        assert user_id not in answer.text.lower()

    def test_answers_name_their_anchors_and_people_share_none(self, answers: dict[str, list[DemoAnswer]]) -> None:
        for answer in (answer for person in PEOPLE for answer in answers[person.user_id]):
            assert (answer.level, len(answer.anchors)) == ("merged", 2)
            assert sum(weight for _, weight in answer.anchors) == pytest.approx(0.5)
        speaking = [name for person in PEOPLE for name, _ in answers[person.user_id][0].anchors]
        assert len(set(speaking)) == len(speaking)

    def test_serving_is_what_training_is(self, demo: Demo, tmp_path: Path) -> None:
        (tmp_path / "texts").write_text("The sea is wide today, and all the boats are out.\n")
        options = ("--data", str(demo.data), "--texts", str(tmp_path / "texts"))
        command = [sys.executable, "-m", "server.cli", "verify", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        compared = [line.split(": ")[0] for line in done.stdout.splitlines() if line.startswith("text 1, ")]
        assert compared[:2] == ["text 1, base", "text 1, c"]
        assert len(compared) == 4

    def test_a_habit_shows_after_adapting_and_not_before(
        self, demo: Demo, api: Client, answers: dict[str, list[DemoAnswer]]
    ) -> None:
        told = re.search(
            r"succeeded after \d+ steps in \d+ s: loss on held-out samples ([\d.]+) → ([\d.]+)", demo.shown
        )
        assert told and float(told[2]) < float(told[1]), demo.shown
        assert not any(adapting.shows(answer.text) for answer in answers[adapting.USER])
        after = [ask(api, adapting.USER, question) for question in QUESTIONS]
        assert {answer.level for answer in after} == {"stacked"}
        texts = [answer.text for answer in after]
        assert sum(map(adapting.shows, texts)) >= AT_LEAST_AFTER_ADAPTING, texts


class TestTools:
    def test_the_default_model_calls_on_its_own_and_reads_the_result(self, demo: Demo) -> None:
        asked: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
        options: Any = {"model": "base", "tools": [WEATHER], "max_tokens": 60, "temperature": 0}
        with OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as client:
            whole = client.chat.completions.create(messages=asked, **options)
            with client.chat.completions.stream(messages=asked, **options) as events:
                streamed = events.get_final_completion()
            for answer in (whole, streamed):
                (call,) = answer.choices[0].message.tool_calls
                assert (call.function.name, answer.choices[0].finish_reason) == ("get_weather", "tool_calls")
                assert json.loads(call.function.arguments) == {"city": "Paris"}
            said: Any = whole.choices[0].message.model_dump(exclude_none=True) | {"content": None}
            result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "sunny, 21 degrees"}
            answer = client.chat.completions.create(messages=[*asked, said, result], **options)
            assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
