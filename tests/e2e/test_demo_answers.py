"""What the demo promises shows in what its server answers: the manners of its anchors, and a habit that no anchor has
once somebody has sent a few samples of it. The real model, bank and processes."""

from __future__ import annotations

import pytest

from deploy.demo import adapting
from deploy.demo.asking import Answer, ask
from deploy.demo.manners import MANNERS, Manner
from deploy.demo.personas import NOBODY, PEOPLE, QUESTIONS, Person
from mta_client import Client

AT_LEAST_AS_SOMEBODY = 4
AT_MOST_AS_NOBODY = 1
AT_LEAST_AFTER_ADAPTING = 3

pytestmark = pytest.mark.timeout(1200)  # the first test here may have to build the bank
each_person = pytest.mark.parametrize("person", PEOPLE, ids=lambda person: person.user_id)


@pytest.fixture(scope="module")
def answers(demo_api: Client) -> dict[str, list[Answer]]:
    """User id → greedy answers to the five questions."""
    users = [NOBODY, *(person.user_id for person in PEOPLE)]
    return {user_id: [ask(demo_api, user_id, question) for question in QUESTIONS] for user_id in users}


@each_person
def test_the_manner_shows_in_a_persons_answers(person: Person, answers: dict[str, list[Answer]]) -> None:
    texts = [answer.text for answer in answers[person.user_id]]
    assert sum(map(person.manner.shows, texts)) >= AT_LEAST_AS_SOMEBODY, texts


@pytest.mark.parametrize("manner", MANNERS, ids=lambda manner: manner.world)
def test_no_manner_shows_in_nobodys_answers(manner: Manner, answers: dict[str, list[Answer]]) -> None:
    texts = [answer.text for answer in answers[NOBODY]]
    assert sum(map(manner.shows, texts)) <= AT_MOST_AS_NOBODY, texts


@each_person
def test_a_persons_answers_say_which_anchors_spoke(person: Person, answers: dict[str, list[Answer]]) -> None:
    for answer in answers[person.user_id]:
        assert answer.level == "merged"
        assert len(answer.anchors) == 2
        assert sum(weight for _, weight in answer.anchors) == pytest.approx(0.5)


def test_people_of_different_manners_share_no_anchor(answers: dict[str, list[Answer]]) -> None:
    speaking = [name for person in PEOPLE for name, _ in answers[person.user_id][0].anchors]
    assert len(set(speaking)) == len(speaking)


def test_nobody_is_answered_by_the_base_model(answers: dict[str, list[Answer]]) -> None:
    assert {(answer.level, answer.anchors) for answer in answers[NOBODY]} == {("base", ())}


def test_a_habit_shows_after_adapting_and_not_before(demo_api: Client) -> None:
    user_id = f"{adapting.USER}-who-adapts"
    (person,) = (person for person in PEOPLE if person.user_id == adapting.USER)
    demo_api.put_profile(user_id, person.lines)
    before = [ask(demo_api, user_id, question) for question in QUESTIONS]
    job = adapting.train(demo_api, user_id).job
    after = [ask(demo_api, user_id, question) for question in QUESTIONS]
    assert (job.state, job.error) == ("succeeded", None)
    assert job.held_out["after"] < job.held_out["before"]
    assert {answer.level for answer in before} == {"merged"}
    assert {answer.level for answer in after} == {"stacked"}
    assert not any(adapting.shows(answer.text) for answer in before)
    texts = [answer.text for answer in after]
    assert sum(map(adapting.shows, texts)) >= AT_LEAST_AFTER_ADAPTING, texts
