"""`python -m deploy.containers images` and `… test`: see the package's docstring."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import httpx
import typer

from adapters.errors import MtaError
from bank.models.folders import ensure_embedder
from bench.fleet.exercise.claims import Claim
from bench.page.report import console, report, tabulate
from bench.rig.tiny import tiny_bank, tiny_model
from deploy.containers import images as building
from deploy.containers.fleet import alerts, deaths, replacement
from deploy.containers.single import persistence, restart
from deploy.containers.site import Site, deployed
from deploy.containers.tool import ContainerError, enter_own_network, found_tool, served
from mta_client import MtaError as ClientError
from server.cli.demo.server import demo_bank
from server.observability.background import exit_on_signals
from server.settings import load_settings

FOLDER = Path("out/containers")
Check = Callable[[Site], list[Claim]]
ON_ONE: dict[str, Check] = {"restart": restart, "persistence": persistence}
ON_FLEET: dict[str, Check] = {"deaths": deaths, "replacement": replacement, "alerts": alerts}
CHECKS = (*ON_ONE, *ON_FLEET)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.command()
def images(
    stand_ins: Annotated[
        bool, typer.Option(help="Make other people's images from Debian's packages.", envvar="STAND_INS")
    ] = False,
    gpu: Annotated[bool, typer.Option(help="Build the engine for NVIDIA GPUs instead of CPUs.", envvar="GPU")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Build the images of gateway and engine, and show their sizes."""
    tool = found_tool(FOLDER)
    if stand_ins:
        for name in building.make_stand_ins(tool):
            console().print(f"{name}: making a stand-in from Debian's packages (1 to 3 minutes)")
    names = building.build(tool, FOLDER, gpu=gpu)
    tabulate([building.sizes(tool, names)], out)


@app.command()
def test(
    bank: Annotated[
        Path | None, typer.Option(help="Folder of a bank for the packaged model.", show_default="the demo's bank")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(CHECKS)}; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Run compose files as docs/deploying.md says, on CPUs; exit status 1 if something is not as it should be."""
    chosen = set(only or CHECKS)
    if unknown := chosen.difference(CHECKS):
        raise ContainerError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(CHECKS)}")
    tool = found_tool(FOLDER)
    claims: list[Claim] = []
    for image in (building.GATEWAY, building.ENGINE_CPU):
        if not tool.has_image(image):
            raise ContainerError(f"there is no image {image}: run `make images`, or `make images STAND_INS=1`")
    enter_own_network(tool)
    with tempfile.TemporaryDirectory() as scratch, served(tool):
        folder = Path(scratch)
        folder.chmod(0o755)  # containers read models and banks below it
        if chosen & ON_ONE.keys():
            people = shutil.copytree(bank or demo_bank(), folder / "people")
            with deployed(Site(tool, folder / "one", readable(people))) as site:
                claims += found_by(ON_ONE, chosen, site)
        if chosen & ON_FLEET.keys():
            chosen_embedder = ensure_embedder(load_settings().embedder, load_settings().cache_dir)
            model = readable(tiny_model(folder / "model"))
            tiny = readable(tiny_bank(folder / "tiny", model, chosen_embedder, anchors=6))
            with deployed(Site(tool, folder / "fleet", tiny, fleet=True, model=model)) as site:
                claims.append(Claim("two of each: ready after `up -d`", f"{site.start():.0f} s", True))
                claims += found_by(ON_FLEET, chosen, site)
    report("containers, as docs/deploying.md starts them", [claim.row for claim in claims], out)


def found_by(checks: Mapping[str, Check], chosen: Container[str], site: Site) -> Iterator[Claim]:
    """Yield what the chosen checks find; what ends one early is a finding, so that the next ones still run."""
    for name in filter(chosen.__contains__, checks):
        console().rule(name, align="left")
        try:
            yield from checks[name](site)
        except (MtaError, ClientError, httpx.HTTPError, AssertionError) as error:
            console().print(str(error), markup=False, soft_wrap=True)
            yield Claim(name, f"ended early: {str(error).partition(chr(10))[0]}", False)


def readable(folder: Path) -> Path:
    """Let everybody read a folder, as deploying.md asks for a bank."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


if __name__ == "__main__":
    exit_on_signals()
    try:
        app()
    except (MtaError, AssertionError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
