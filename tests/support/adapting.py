"""Samples of a habit, and asking a gateway to adapt somebody to them."""

from __future__ import annotations

from typing import Any

import httpx

SAMPLES = [{"input": f"question {n}", "output": f"{n} yes yes yes"} for n in range(8)]


def adapt(client: httpx.Client, user_id: str, **fields: Any) -> httpx.Response:
    return client.post(f"/users/{user_id}/adapt", json={"samples": SAMPLES} | fields)


def job_of(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = client.get(f"/jobs/{job['id']}").raise_for_status().json()
    return answer
