"""`mta bench`: each command takes the options of its benchmark's `main`, which it imports when it runs."""

from __future__ import annotations

from importlib import import_module

import typer

from adapters.errors import MtaError
from server.observability.background import exit_on_signals

app = typer.Typer(name="bench", help="Measure this machine: tables, JSON, pictures.", no_args_is_help=True)
fleet = typer.Typer(name="fleet", help="Several engines behind a router, and simulated fleets.", no_args_is_help=True)
app.add_typer(fleet)

BENCHMARKS = {
    "cost": ("bench.serving.cost", "Cost of a personal answer: base model against recipe."),
    "cold": ("bench.serving.cold", "Time until a new recipe is usable, by step."),
    "thrash": ("bench.serving.thrash", "More users than slots, compared with stock vLLM and as many PEFT folders."),
    "shared": ("bench.serving.shared", "First tokens of users who share a system prompt."),
    "stall": ("bench.serving.stall", "Delay that new users cause for running streams."),
    "adapt": ("bench.adapt.wait", "Time that a user waits for few-shot adaptation."),
    "scale": ("bench.scale.__main__", "A million users in the store, 10,000 anchors, 10,000 people imported."),
    "overload": ("bench.fleet.overload", "Two gateways, 500 streams, twice the capacity, clients that do not read."),
    "fairness": ("bench.fleet.fairness", "Effect of one greedy key on the others, such as requests for many answers."),
    "report": ("bench.page.__main__", "Fill docs/performance.md with tables and pictures from the JSON files."),
    "fleet lasting": ("bench.fleet.lasting", "Hours of load with deaths, backups and changes of bank and secret."),
    "fleet chaos": ("bench.fleet.chaos", "Check all guarantees while parts are killed and paused under load."),
    "fleet replicas": ("bench.fleet.replicas", "Check that two engines behind the router answer like one."),
    "fleet simulate": ("bench.fleet.simulate", "Warm hits and balance of simulated fleets of 10 to 1,000 engines."),
    "fleet rolling": ("bench.fleet.rolling", "Replace every part and the bank under load without a failed request."),
}


def _register(name: str, module: str, about: str) -> None:
    group = fleet if name.startswith("fleet ") else app
    pass_through = {"allow_extra_args": True, "ignore_unknown_options": True}

    @group.command(name.rpartition(" ")[2], help=about, add_help_option=False, context_settings=pass_through)
    def run(context: typer.Context) -> None:
        inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        exit_on_signals()
        try:
            inner.command()(import_module(module).main)
        except ModuleNotFoundError as error:
            raise MtaError(f"{error.name} is not installed here: benchmarks need the extra `cpu` or `gpu`") from error
        inner(args=context.args, prog_name=context.command_path, standalone_mode=True)


for _name, (_module, _about) in BENCHMARKS.items():
    _register(_name, _module, _about)
