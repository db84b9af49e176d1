"""Job ids as text: one text for each, and nothing else is read."""

from __future__ import annotations

import pytest

from server.store.jobs import JobId, parse_job_id

USER = "axi2q2svfyrolurh6ecirfzy3m"


@pytest.mark.parametrize("number", [1, 10, 9_999_999_999])
def test_a_job_id_comes_back_from_its_text(number: int) -> None:
    assert parse_job_id(f"{USER}.{number}") == JobId(USER, number)
    assert str(JobId(USER, number)) == f"{USER}.{number}"


@pytest.mark.parametrize("text", ["", "a", "a.", ".1", "a.01", "a.-1", "a.1.2", "a.x", "a/b.1", "a.²"])
def test_any_other_text_is_refused(text: str) -> None:
    assert parse_job_id(text) is None
    assert parse_job_id(text.replace("a", USER, 1)) is None
