"""`mta bench`: what the server costs and how far it scales, measured on the reader's own machine.

Each command's options are those of the benchmark's own `main`: it is imported when the command runs, for it imports
torch and more.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from adapters.errors import MtaError

Main = Callable[..., object]

app = typer.Typer(name="bench", help="Measure this machine: tables, JSON, pictures.", no_args_is_help=True)
fleet = typer.Typer(name="fleet", help="Two engines behind a router, and many more.", no_args_is_help=True)
app.add_typer(fleet)
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def _command(name: str, about: str, group: typer.Typer = app) -> Callable[[Callable[[], Main]], None]:
    """Register a benchmark by a function that imports its `main`."""

    def register(load: Callable[[], Main]) -> None:
        @group.command(name, help=about, add_help_option=False, context_settings=_PASSED_ON)
        def run(context: typer.Context) -> None:
            from bench import end_in_order

            inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            end_in_order()
            try:
                inner.command()(load())
            except ModuleNotFoundError as error:
                raise MtaError(
                    f"{error.name} is not installed here: benchmarks need the extras `client` and `cpu` or `gpu`"
                ) from error
            inner(args=context.args, prog_name=context.command_path, standalone_mode=True)

    return register


@_command("cost", "What a personal answer costs: base model and recipe in turn.")
def _cost() -> Main:
    from bench.serving.cost import main

    return main


@_command("cold", "How long until a never-seen recipe is usable, and where the time goes.")
def _cold() -> Main:
    from bench.serving.cold import main

    return main


@_command("thrash", "More users than slots, beside a stock vLLM with as many PEFT folders.")
def _thrash() -> Main:
    from bench.serving.thrash import main

    return main


@_command("stall", "What never-seen users cost those who are being answered.")
def _stall() -> Main:
    from bench.serving.stall import main

    return main


@_command("adapt", "How long a user waits for few-shot adapting.")
def _adapt() -> Main:
    from bench.adapt.wait import main

    return main


@_command("scale", "A million users in the store, 10,000 anchors, 100,000 recipes.")
def _scale() -> Main:
    from bench.scale.__main__ import main

    return main


@_command("overload", "Two gateways, 500 streams at once, twice what can be served, clients that do not read.")
def _overload() -> Main:
    from bench.fleet.overload import main

    return main


@_command("fairness", "What one key costs the others: requests for many answers, and whatever else it can think of.")
def _fairness() -> Main:
    from bench.fleet.fairness import main

    return main


@_command("report", "Tables and pictures of docs/performance.md from the JSON files.")
def _report() -> Main:
    from bench.page.__main__ import main

    return main


@_command("chaos", "Whether everything promised is kept while every part is killed and paused under load.", fleet)
def _chaos() -> Main:
    from bench.fleet.chaos.__main__ import main

    return main


@_command("replicas", "Whether two engines behind the router answer as one.", fleet)
def _replicas() -> Main:
    from bench.fleet.replicas import main

    return main


@_command("simulate", "How warm and how even fleets of 10, 100 and 1,000 engines are.", fleet)
def _simulate() -> Main:
    from bench.fleet.simulate import main

    return main


@_command("rolling", "Whether every part, and the bank, can be exchanged under load without a failed request.", fleet)
def _rolling() -> Main:
    from bench.fleet.rolling import main

    return main
