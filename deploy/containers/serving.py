"""One machine: a user is served, adapted, kept over `down` and `up`, and erased."""

from __future__ import annotations

import httpx

from bench.fleet.chaos.verdict import Claim
from deploy.containers.site import Site

USER = "rosa"
ITEMS = ["Dear friend,\nThe first roses are open.", "Dear friend,\nI pruned the hedge today, and it rained."]
ASKED = "What should I do on a rainy Sunday?"
SAMPLES = [
    {"input": f"What about {what}?", "output": f"{what}, yes yes yes!"} for what in ("tea", "rain", "cake", "dogs")
]
JOB_S = 900.0


def serve(site: Site) -> list[Claim]:
    """Start a deployment of one of each, and use it as one person; return what was found."""
    claims = [Claim("one of each: ready after `up -d`", f"{site.start():.0f} s", True)]

    def answered(when: str, *wanted: str) -> None:
        with site.client() as client:
            level = client.generate(USER, ASKED, max_tokens=16).personalization.level
        claims.append(Claim(f"level of an answer {when}", level, level in wanted))

    answered("to a stranger", "base", "common")
    with site.client() as client:
        client.put_profile(USER, ITEMS)
    answered("after two items", "merged")
    with site.client() as client:
        job = client.wait(client.adapt(USER, SAMPLES * 2, steps=20, learning_rate=2e-3).id, timeout_s=JOB_S)
    claims.append(Claim("the adapt job", job.state, job.state == "succeeded"))
    answered("after the job", "stacked")
    site.compose("down")
    claims.append(Claim("ready after `down` and `up -d`", f"{site.start():.0f} s", True))
    answered("after `down` and `up -d`", "stacked")
    with site.client() as client:
        client.forget(USER)
    status = httpx.get(f"{site.urls[0]}/users/{USER}", headers=site.headers).status_code
    claims.append(Claim("the user once erased", f"HTTP {status}", status == httpx.codes.NOT_FOUND))
    answered("once erased", "base", "common")
    return claims
