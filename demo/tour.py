"""What the demo shows of a running server: three people, whom it knows by a few lines, and one whom it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rich.table import Table

from demo import adapting
from demo.answers import answers_table, ask
from demo.personas import NOBODY, PEOPLE, QUESTIONS
from mta_client import Client, MtaError

SHOWN_QUESTIONS = QUESTIONS[:2]
_EXCERPT_CHARS = 44

Step = Callable[[str], AbstractContextManager[None]]


def tour(api: Client, step: Step, line: Callable[[str], None]) -> Iterator[Table]:
    """Take the steps on the server, and yield the tables to show; `line` prints what a step did.

    Raises:
        MtaError: if the server refuses a call, or the training fails.
    """
    with step("Three people who are not anchors, each with a few lines of their writing"):
        for person in PEOPLE:
            api.forget(person.user_id, missing_ok=True)  # left by an earlier run
            api.put_profile(person.user_id, person.lines)
            start = " ".join(person.lines[0].split())[:_EXCERPT_CHARS]
            line(f"PUT /users/{person.user_id}/profile: {len(person.lines)} lines, “{start}…”")
    marks = {NOBODY: "no profile"} | {person.user_id: person.manner.mark for person in PEOPLE}
    with step("POST /generate: the same questions, as nobody and as each of them"):
        ask(api, NOBODY, QUESTIONS[-1])  # warm up: the first request is slow
        asked = [(question, user_id) for question in SHOWN_QUESTIONS for user_id in marks]
        answers = {(question, user_id): ask(api, user_id, question) for question, user_id in asked}
    yield answers_table(SHOWN_QUESTIONS, answers, marks)
    with step(f"POST /users/{adapting.USER}/adapt: {adapting.SAMPLES} samples of a habit that no anchor has"):
        before = [answers[question, adapting.USER] for question in SHOWN_QUESTIONS]
        job, seconds = adapting.train(api, adapting.USER)
        if job.error:
            raise MtaError(f"the training failed: {job.error}", "failed")
        for text in (*adapting.loss_curve(job), adapting.outcome(job, seconds)):
            line(text)
        after = [ask(api, adapting.USER, question) for question in SHOWN_QUESTIONS]
    yield adapting.before_and_after(before, after)
