"""How the demo reads the server's streams."""

from __future__ import annotations

import io

import pytest

from deploy.demo.client import DemoError, _events


def test_events_are_read_up_to_done_and_comments_passed_over() -> None:
    lines = b': keep-alive\n\ndata: {"state": "queued"}\n\n: keep-alive\n\ndata: {"state": "running"}\n\n'
    assert list(_events(io.BytesIO(lines + b"data: [DONE]\n\nno json"))) == [{"state": "queued"}, {"state": "running"}]
    with pytest.raises(DemoError, match="in the middle"):
        list(_events(io.BytesIO(lines)))
