"""One machine: a copy of the store is brought back after a loss, and MTA_SECRET is exchanged."""

from __future__ import annotations

import secrets
import time

import httpx

from bench.fleet.chaos.verdict import Claim
from deploy.containers.serving import ASKED, ITEMS
from deploy.containers.site import Site
from server.store.rotation import GRACE_MS

KEPT, ERASED = "kept", "erased"


def keep(site: Site) -> list[Claim]:
    """Do what docs/operations.md tells operators to do; return what was found."""
    claims = []

    def found(when: str) -> None:
        with site.client() as client:
            level = client.generate(KEPT, ASKED, max_tokens=4).personalization.level
        status = httpx.get(f"{site.urls[0]}/users/{ERASED}", headers=site.headers).status_code
        claims.append(Claim(f"level of an answer {when}", level, level == "merged"))
        claims.append(Claim(f"whom was erased {when}", f"HTTP {status}", status == httpx.codes.NOT_FOUND))

    site.start()
    with site.client() as client:
        for user in (KEPT, ERASED):
            client.put_profile(user, ITEMS)
        copied = site.compose("run", "--rm", "backup").strip()
        client.forget(ERASED)
    claims.append(Claim("`run --rm backup`", copied, copied.startswith("/backups/")))

    site.compose("down")
    site.tool.run("volume", "rm", f"{site.project}_redis")
    site.compose("up", "-d", "--wait", "redis")
    mounted = ("-v", f"{site.project}_backups:/backups")
    command = ("mta", "restore", copied.partition(": ")[0], "--erased", "/audit")
    restored = site.compose("run", "--rm", "--no-deps", *mounted, "gateway", *command).strip()
    claims.append(Claim("`mta restore` to a new store", restored, "; 1 who were erased since stay erased" in restored))
    site.start()
    found("once restored")

    new, old = secrets.token_hex(32), site.settings["MTA_SECRET"]
    site.settings["MTA_SECRET"] = f"{new},{old}"
    site.start()
    rotated = site.compose("exec", "-T", "gateway", "mta", "secret", "rotate").strip()
    claims.append(Claim("`mta secret rotate`", rotated, "nobody is left under the old secret" in rotated))
    time.sleep(GRACE_MS / 1000)
    site.settings["MTA_SECRET"] = new
    site.start()
    found("with the new secret alone")
    return claims
