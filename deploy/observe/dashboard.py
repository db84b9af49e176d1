"""`python -m deploy.observe.dashboard`: the Grafana dashboard, written to `dashboard.json` beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common
from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, VisibilityMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef

FILE = Path(__file__).with_name("dashboard.json")
WINDOW = "$__rate_interval"
"""Grafana's variable for the window of rates."""

_THIRD = 8
_SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")


@dataclass(frozen=True, slots=True)
class Query:
    """A Prometheus query; `legend` is the name pattern of its lines."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Graph:
    """Lines over time."""

    title: str
    unit: str  # as Grafana names it
    queries: tuple[Query, ...]


def _rate(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}[{WINDOW}]))"


def _quantile(fraction: float, metric: str, by: str = "") -> str:
    return f"histogram_quantile({fraction}, {_rate(f'{metric}_bucket', f'le, {by}' if by else 'le')})"


def _quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(Query(_quantile(fraction, metric), f"p{fraction * 100:.0f}") for fraction in (0.5, 0.95, 0.99))


def _of_commands(what: str = "") -> str:
    metric = f"mta_store_command_{what}_total" if what else "mta_store_commands_total"
    return f"max by (server, command) (rate({metric}[{WINDOW}]))"  # every gateway reports the same


def _graph(title: str, unit: str, *queries: tuple[str, str]) -> Graph:
    return Graph(title, unit, tuple(Query(*query) for query in queries))


ROWS: dict[str, Sequence[Graph]] = {
    "Requests": (
        _graph("Generations, by how they end", "reqps", (_rate("mta_generations_total", "outcome"), "{{outcome}}")),
        _graph(
            "Answers, by level", "reqps", (_rate('mta_generations_total{outcome="answered"}', "level"), "{{level}}")
        ),
        _graph("Generations, by tenant", "reqps", (_rate("mta_generations_total", "tenant"), "{{tenant}}")),
        _graph("Tokens a second", "short", (_rate("mta_tokens_total", "level, kind"), "{{level}}, {{kind}}")),
        _graph(
            "The line before the engines",
            "short",
            ("sum(mta_queue_waiting)", "waiting"),
            ("sum(mta_queue_running)", "in the engines"),
        ),
        _graph("Turned away, by reason", "reqps", (_rate("mta_shed_total", "reason"), "{{reason}}")),
    ),
    "Latency": (
        Graph("To the first token", "s", _quantiles("mta_ttft_seconds")),
        _graph("To the first token, p95 by level", "s", (_quantile(0.95, "mta_ttft_seconds", "level"), "{{level}}")),
        Graph("Between two tokens", "s", _quantiles("mta_inter_token_seconds")),
        _graph(
            "Where the time goes, mean by stage",
            "s",
            (f"{_rate('mta_stage_seconds_sum', 'stage')} / {_rate('mta_stage_seconds_count', 'stage')}", "{{stage}}"),
        ),
        Graph("In the line", "s", _quantiles("mta_queue_seconds")),
        _graph("Store, p95", "s", (_quantile(0.95, "mta_store_seconds", "job, kind"), "{{job}}, {{kind}}")),
    ),
    "Adapters": (
        _graph(
            "Requests that found their adapter, and that did not",
            "reqps",
            (_rate('mta_engine_prepares_total{job="engine"}', "kind"), "{{kind}}"),
        ),
        _graph(
            "Making an adapter ready, p95",
            "s",
            (_quantile(0.95, "mta_engine_fuse_seconds"), "fuse"),
            (_quantile(0.95, "mta_engine_slot_write_seconds"), "copy into a slot"),
            (_quantile(0.95, "mta_engine_bring_in_seconds"), "what a step waits"),
        ),
        _graph(
            "Slots",
            "short",
            ('mta_engine_slots_resident{job="engine"}', "{{instance}}, taken"),
            ('mta_engine_slots{job="engine"}', "{{instance}}, all"),
        ),
        _graph(
            "Slots taken from a recipe, and shared",
            "ops",
            (_rate("mta_engine_slot_evictions_total"), "evictions"),
            (_rate("mta_engine_shared_slots_total"), "requests that share one"),
        ),
        _graph(
            "Recipes",
            "short",
            ("sum({__name__='mta:adapters_in_use'})", "in use"),
            ("sum({__name__='mta:adapter_names'})", "known"),
            (_rate("mta_fallbacks_total"), "answers by less than the user's own, a second"),
        ),
        _graph(
            "vLLM",
            "short",
            ("sum({__name__='vllm:num_requests_running'})", "running"),
            ("sum({__name__='vllm:num_requests_waiting'})", "waiting"),
            ("max({__name__='vllm:kv_cache_usage_perc'})", "share of the KV cache"),
        ),
    ),
    "Adapt jobs": (
        _graph("Jobs", "short", ("max by (state) (mta_jobs)", "{{state}}")),
        _graph(
            "How long the oldest takes",
            "s",
            ("max(mta_jobs_oldest_seconds)", "queued"),
            ("max(mta_worker_job_running_seconds)", "in training"),
        ),
        _graph(
            "Jobs an hour, by outcome",
            "short",
            (f"3600 * {_rate('mta_worker_jobs_total', 'outcome')}", "{{outcome}}"),
        ),
        _graph(
            "Waiting and training, p95",
            "s",
            (_quantile(0.95, "mta_worker_job_wait_seconds"), "until a worker takes it"),
            (_quantile(0.95, "mta_worker_job_seconds"), "in the worker"),
        ),
    ),
    "Store": (
        _graph(
            "Memory",
            "bytes",
            ("max(mta_store_used_bytes)", "taken"),
            ("max(mta_store_max_bytes)", "all"),
            ("max by (server) (mta_store_resident_bytes)", "of the process {{server}}"),
        ),
        _graph("Failures", "ops", (_rate('mta_store_seconds_count{outcome="failed"}', "job"), "{{job}}")),
        _graph(
            "Rewriting the file",
            "s",
            ("max by (server) (mta_store_fork_seconds)", "the last fork {{server}}"),
            ("max by (server) (mta_store_rewrite_seconds)", "the last rewrite {{server}}"),
        ),
        _graph("Replicas", "short", ("max by (server) (mta_store_replicas)", "{{server}}")),
        _graph(
            "Slowest commands, mean",
            "s",
            (f"topk(5, {_of_commands('seconds')} / {_of_commands()})", "{{command}} {{server}}"),
        ),
    ),
    "Processes": (
        _graph(
            "Up",
            "short",
            ("up", "{{job}} {{instance}}"),
            ("mta_ready", "{{instance}} is ready"),
        ),
        _graph(
            "Processor", "percentunit", (_rate("process_cpu_seconds_total", "job, instance"), "{{job}} {{instance}}")
        ),
        _graph("Memory", "bytes", ("process_resident_memory_bytes", "{{job}} {{instance}}")),
        _graph("Open files", "short", ("process_open_fds", "{{job}} {{instance}}")),
    ),
}


def graphs() -> list[Graph]:
    """All of them."""
    return [graph for row in ROWS.values() for graph in row]


def dashboard() -> str:
    """The dashboard as Grafana reads it."""
    board = (
        Dashboard("MTA server")
        .uid("mta-server")
        .tags(["mta"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .readonly()
    )
    for title, row in ROWS.items():
        board.with_row(Row(title))
        for graph in row:
            board.with_panel(_panel(graph))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _panel(graph: Graph) -> TimeSeries:
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    panel = (
        TimeSeries()
        .title(graph.title)
        .unit(graph.unit)
        .datasource(_SOURCE)
        .min(0)
        .span(_THIRD)
        .height(_THIRD)
        .legend(legend)
        .show_points(VisibilityMode.NEVER)
    )
    for position, query in enumerate(graph.queries):
        panel.with_target(
            Dataquery().expr(query.expression).legend_format(query.legend).ref_id(chr(ord("A") + position)).range()
        )
    return panel


if __name__ == "__main__":
    FILE.write_text(dashboard(), encoding="utf-8")
