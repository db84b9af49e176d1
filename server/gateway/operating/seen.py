"""What a gateway shows of the parts that it looks at: engines, and whether requests can be served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.gateway.engines.admin import EngineFigures
from server.gateway.operating.health import Readiness
from server.store.durability import Memory


class SeenParts(Collector):
    """Each engine by its place among those that the gateway knows, and the gateway's own readiness.

    Args:
        engines: what each last said of itself.
        readiness: as `/ready` has it.
        memory: the store's.
    """

    def __init__(
        self,
        engines: Callable[[], Sequence[EngineFigures | None]],
        readiness: Callable[[], Readiness],
        memory: Callable[[], Memory | None],
    ) -> None:
        self._engines = engines
        self._readiness = readiness
        self._memory = memory

    def collect(self) -> Iterator[Metric]:
        """All of it, as it is known now."""
        ready = self._readiness() is Readiness.READY
        yield GaugeMetricFamily("mta_ready", "Whether requests can be fully served, as /ready says.", float(ready))
        if memory := self._memory():
            yield GaugeMetricFamily("mta_store_used_bytes", "What the store's memory holds.", memory.used_bytes)
            if memory.most_bytes:
                yield GaugeMetricFamily("mta_store_max_bytes", "The most that it may hold.", memory.most_bytes)
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
