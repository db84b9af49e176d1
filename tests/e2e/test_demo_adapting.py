"""A habit that no anchor has shows in somebody's answers once they have sent a few samples of it."""

from __future__ import annotations

import pytest

from deploy.demo import adapting
from deploy.demo.asking import ask
from deploy.demo.personas import PEOPLE, QUESTIONS
from mta_client import Client

pytestmark = pytest.mark.timeout(1200)  # it may have to build the bank

AT_LEAST_AFTER = 3
USER = "kai-who-adapts"


def test_the_habit_shows_after_adapting_and_not_before(demo_api: Client) -> None:
    (person,) = (person for person in PEOPLE if person.user_id == adapting.USER)
    demo_api.put_profile(USER, person.lines)
    before = [ask(demo_api, USER, question) for question in QUESTIONS]
    job = adapting.train(demo_api, USER).job
    after = [ask(demo_api, USER, question) for question in QUESTIONS]
    assert (job.state, job.error) == ("succeeded", None)
    assert job.held_out["after"] < job.held_out["before"]
    assert {answer.level for answer in before} == {"merged"}
    assert {answer.level for answer in after} == {"stacked"}
    assert not any(adapting.shows(answer.text) for answer in before)
    assert sum(adapting.shows(answer.text) for answer in after) >= AT_LEAST_AFTER, [a.text for a in after]
