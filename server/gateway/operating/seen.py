"""What a gateway shows of the parts that it looks at: engines, and whether requests can be served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.gateway.engines.admin import EngineFigures
from server.gateway.operating.health import Readiness


class SeenParts(Collector):
    """Each engine by its place among those that the gateway knows, and the gateway's own readiness.

    Args:
        engines: what each last said of itself.
        readiness: as `/ready` has it.
    """

    def __init__(
        self, engines: Callable[[], Sequence[EngineFigures | None]], readiness: Callable[[], Readiness]
    ) -> None:
        self._engines = engines
        self._readiness = readiness

    def collect(self) -> Iterator[Metric]:
        """All of it, as it is known now."""
        ready = self._readiness() is Readiness.READY
        yield GaugeMetricFamily("mta_ready", "Whether requests can be fully served, as /ready says.", float(ready))
        up = GaugeMetricFamily("mta_engine_up", "Whether an engine answers.", labels=("engine",))
        slots = GaugeMetricFamily("mta_engine_slots", "An engine's LoRA slots.", labels=("engine",))
        resident = GaugeMetricFamily(
            "mta_engine_slots_resident", "How many of an engine's slots hold an adapter.", labels=("engine",)
        )
        prepares = CounterMetricFamily(
            "mta_engine_prepares",
            "Requests that an engine made an adapter ready for: warm ones found it there, cold ones had it fused.",
            labels=("engine", "kind"),
        )
        for place, figures in enumerate(self._engines()):
            engine = str(place)
            up.add_metric((engine,), float(figures is not None))
            if figures is None:
                continue
            for family, value in ((slots, figures.slots), (resident, figures.slots_taken)):
                if value is not None:
                    family.add_metric((engine,), value)
            if figures.prepares is not None and figures.fuses is not None:
                prepares.add_metric((engine, "cold"), figures.fuses)
                prepares.add_metric((engine, "warm"), max(0, figures.prepares - figures.fuses))
        yield from (up, slots, resident, prepares)
