"""A fleet: other images take the place of the running ones under load, in the order that deploying.md gives."""

from __future__ import annotations

import re
import time

from bench.fleet.chaos.verdict import Claim
from bench.fleet.rolling import CALM_S, CLIENTS, PEOPLE, Load
from bench.page.report import console
from bench.rig.tiny import WORLDS
from deploy.containers.images import ENGINE_CPU, GATEWAY
from deploy.containers.site import Site
from deploy.containers.tool import ROOT


def roll(site: Site) -> list[Claim]:
    """Make new images, and replace each service as deploying.md says; return the requests that failed."""
    page = (ROOT / "docs" / "deploying.md").read_text("utf-8")
    found = re.search(r"for part in ([\w -]+); do", page)
    assert found, "deploying.md names no parts"
    with site.client() as client:
        for user in range(PEOPLE):
            client.put_profile(f"rolled-{user}", WORLDS[:1])
    for image in (GATEWAY, ENGINE_CPU):
        _next(site, image)
    loads = [Load(site.urls, seed, site.headers) for seed in range(CLIENTS)]
    for load in loads:
        load.start()
    site.compose("run", "--rm", "models")
    gateways = dict(zip(("gateway", "gateway-2"), site.urls, strict=True))
    for part in found[1].split():
        for load in loads:
            load.left_out = gateways.get(part, "")
        site.compose("up", "-d", "--no-deps", "--wait", part)
        for load in loads:
            load.left_out = ""
        failed = sum(len(load.failures) for load in loads)
        console().print(f"replaced: {part}; {failed} requests failed so far")
        time.sleep(CALM_S)
    for load in loads:
        load.stop()
    failures = [failure for load in loads for failure in load.failures]
    answers, base = sum(load.recipes.total() for load in loads), sum(load.recipes[""] for load in loads)
    labels = {part: site.inspected(part, f'{{{{index .Config.Labels "{LABEL}"}}}}') for part in found[1].split()}
    old = [part for part, label in labels.items() if label != site.project]
    return [
        Claim("replaced under load", f"{len(labels)} services, {answers:,} answers", answers > 0),
        Claim("requests that failed meanwhile", f"{len(failures)} {failures[:3] or ''}".strip(), not failures),
        Claim("answers by the base model meanwhile", f"{base}", not base),
        Claim("services that run an old image", ", ".join(old) or "none", not old),
    ]


LABEL = "mta.check"


def _next(site: Site, image: str) -> None:
    """Give an image's name to another one, with a label more."""
    file = site.folder / "next.Dockerfile"
    file.write_text(f'FROM {image}\nLABEL {LABEL}="{site.project}"\n', "utf-8")
    site.tool.run("build", "--file", file.resolve(), "--tag", image, site.folder.resolve())
