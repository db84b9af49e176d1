"""`mta bench`: what the server costs and how far it scales, measured on the reader's own machine.

Each command's options are those of the benchmark's own `main`, which is imported when the command runs: it needs torch.
"""

from __future__ import annotations

from importlib import import_module

import typer

from adapters.errors import MtaError

app = typer.Typer(name="bench", help="Measure this machine: tables, JSON, pictures.", no_args_is_help=True)
fleet = typer.Typer(name="fleet", help="Two engines behind a router, and many more.", no_args_is_help=True)
app.add_typer(fleet)

BENCHMARKS = {
    "bench.serving.cost": "What a personal answer costs: base model and recipe in turn.",
    "bench.serving.cold": "How long until a never-seen recipe is usable, and where the time goes.",
    "bench.serving.thrash": "More users than slots, beside a stock vLLM with as many PEFT folders.",
    "bench.serving.stall": "What never-seen users cost those who are being answered.",
    "bench.adapt.wait": "How long a user waits for few-shot adapting.",
    "bench.scale.__main__": "A million users in the store, 10,000 anchors, 100,000 recipes.",
    "bench.fleet.overload": "Two gateways, 500 streams at once, twice what can be served, clients that do not read.",
    "bench.fleet.fairness": "What one key costs the others: requests for many answers, and other greed.",
    "bench.page.__main__": "Tables and pictures of docs/performance.md from the JSON files.",
    "bench.fleet.chaos.__main__": "Whether everything promised is kept while parts are killed and paused under load.",
    "bench.fleet.replicas": "Whether two engines behind the router answer as one.",
    "bench.fleet.simulate": "How warm and how even fleets of 10, 100 and 1,000 engines are.",
    "bench.fleet.rolling": "Whether every part, and the bank, can be exchanged under load without a failed request.",
}
_NAMES = {"bench.adapt.wait": "adapt", "bench.page.__main__": "report"}  # others are called as their modules
_OF_A_FLEET = ("chaos", "replicas", "simulate", "rolling")


def _register(module: str, about: str) -> None:
    """Make a command of a benchmark's `main`."""
    name = _NAMES.get(module) or module.removesuffix(".__main__").rpartition(".")[2]
    group = fleet if name in _OF_A_FLEET else app
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}

    @group.command(name, help=about, add_help_option=False, context_settings=passed_on)
    def run(context: typer.Context) -> None:
        from bench import end_in_order

        inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        end_in_order()
        try:
            inner.command()(import_module(module).main)
        except ModuleNotFoundError as error:
            raise MtaError(f"{error.name} is not installed here: benchmarks need the extra `cpu` or `gpu`") from error
        inner(args=context.args, prog_name=context.command_path, standalone_mode=True)


for _module, _about in BENCHMARKS.items():
    _register(_module, _about)
