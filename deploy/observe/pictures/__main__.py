"""`python -m deploy.observe.pictures`: a request and an adapt job as traces, and the dashboard, from a real run.

They go to docs/pictures/observe_*.png. A tiny model is enough: what is shown is where time goes, not how much of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bank.models.folders import ensure_embedder
from bench.rig.processes import wait_until
from bench.rig.tiny import tiny_bank, tiny_model
from deploy.observe.pictures.plots import draw_dashboard, draw_traces
from deploy.observe.pictures.watched import Watched, use, watched
from server.settings import Settings

STEPS = 150
"""Of the job: enough to be seen in the graphs."""

OUT = Path(__file__).resolve().parents[3] / "docs" / "pictures"


def draw(run: Watched, folder: Path) -> None:
    """Draw what was seen of a run."""
    receiver = run.receiver
    wait_until(lambda: any(span.name == "adapt" for span in receiver.spans), "the worker's spans")
    adapt = next(span for span in receiver.spans if span.name == "adapt")
    request = next(span for span in receiver.spans if span.name == "prepare").trace_id
    answer = next(span for span in receiver.spans if adapt.trace_id in span.links).trace_id
    draw_traces(*map(receiver.trace, (request, adapt.trace_id, answer)), folder / "observe_traces.png")
    draw_dashboard(run.prometheus, run.began_s, time.time(), folder / "observe_dashboard.png")


def main() -> None:
    """Make everything in a folder that is removed."""
    parser = argparse.ArgumentParser(prog="python -m deploy.observe.pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the pictures ({OUT})")
    parser.add_argument("--seconds", type=float, default=60, help="how long people use the server")
    chosen = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder, embedder = Path(temporary), ensure_embedder(None, Settings().cache_dir)
        model = tiny_model(folder / "model")
        bank = tiny_bank(folder / "bank", model, embedder, anchors=6)
        options = ("--bank", str(bank), "--model", str(model), "--max-loras", "4")
        with watched(folder, *options, MTA_EMBEDDER=str(embedder)) as run:
            use(run, chosen.seconds, STEPS)
            draw(run, chosen.out)


if __name__ == "__main__":
    main()
