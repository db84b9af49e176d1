"""Checks of one machine: what `down` and `up` keep of a user, and what operators do with the store and its secret."""

from __future__ import annotations

import secrets

import httpx

from bench.fleet.exercise.claims import Claim
from bench.fleet.exercise.replacing import exchange_secret
from deploy.containers.site import Site

USER, KEPT, ERASED = "rosa", "kept", "erased"
ITEMS = ["Dear friend,\nThe first roses are open.", "Dear friend,\nI pruned the hedge today, and it rained."]
ASKED = "What should I do on a rainy Sunday?"
SAMPLES = [
    {"input": f"What about {what}?", "output": f"{what}, yes yes yes!"} for what in ("tea", "rain", "cake", "dogs")
]
JOB_S = 900.0


def restart(site: Site) -> list[Claim]:
    """Start a deployment of one of each; a user is served, adapted, kept over `down` and `up`, and erased."""
    claims = [Claim("one of each: ready after `up -d`", f"{site.start():.0f} s", True)]
    claims.append(_level(site, USER, "to a stranger", "base", "common"))
    with site.client() as client:
        client.put_profile(USER, ITEMS)
    claims.append(_level(site, USER, "after two items", "merged"))
    with site.client() as client:
        job = client.wait(client.adapt(USER, SAMPLES * 2, steps=20, learning_rate=2e-3).id, timeout_s=JOB_S)
    claims.append(Claim("the adapt job", job.state, job.state == "succeeded"))
    claims.append(_level(site, USER, "after the job", "stacked"))
    site.compose("down")
    claims.append(Claim("ready after `down` and `up -d`", f"{site.start():.0f} s", True))
    claims.append(_level(site, USER, "after `down` and `up -d`", "stacked"))
    with site.client() as client:
        client.forget(USER)
    claims.append(_absence(site, USER, "the user once erased"))
    claims.append(_level(site, USER, "once erased", "base", "common"))
    return claims


def persistence(site: Site) -> list[Claim]:
    """Bring a copy of the store back after its loss, and exchange MTA_SECRET, as docs/operations.md says."""
    site.start()
    with site.client() as client:
        for user in (KEPT, ERASED):
            client.put_profile(user, ITEMS)
        copied = site.compose("run", "--rm", "backup").strip()
        client.forget(ERASED)
    claims = [Claim("`run --rm backup`", copied, copied.startswith("/backups/"))]

    site.compose("down")
    site.tool.run("volume", "rm", f"{site.project}_redis")
    site.compose("up", "-d", "--wait", "redis")
    mounted = ("-v", f"{site.project}_backups:/backups")
    command = ("mta", "restore", copied.partition(": ")[0], "--erased", "/audit")
    restored = site.compose("run", "--rm", "--no-deps", *mounted, "gateway", *command).strip()
    claims.append(Claim("`mta restore` to a new store", restored, "; 1 who were erased since stay erased" in restored))
    site.start()
    claims += _after(site, "once restored")

    rotated = exchange_secret(site, secrets.token_hex(32))
    claims.append(Claim("`mta secret rotate`", rotated, "nobody is left under the old secret" in rotated))
    return [*claims, *_after(site, "with the new secret alone")]


def _after(site: Site, when: str) -> list[Claim]:
    return [_level(site, KEPT, when, "merged"), _absence(site, ERASED, f"whom was erased {when}")]


def _level(site: Site, user: str, when: str, *wanted: str) -> Claim:
    with site.client() as client:
        level = client.generate(user, ASKED, max_tokens=16).personalization.level
    return Claim(f"level of an answer {when}", level, level in wanted)


def _absence(site: Site, user: str, what: str) -> Claim:
    status = httpx.get(f"{site.urls[0]}/users/{user}", headers=site.headers).status_code
    return Claim(what, f"HTTP {status}", status == httpx.codes.NOT_FOUND)
