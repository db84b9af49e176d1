"""One bank for several kinds of text: does merging find more than a person's kind?

    python -m evaluation.studies.mixed --data ../data

builds a bank of bloggers, reporters, mail writers and headline authors, and compares methods on others of each kind,
whose names begin with their kind. The method `kind` is the mean of the anchors of the person's own kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.progress import Progress

from adapters.training.adapt_config import AdaptConfig
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bank.models.folders import ensure_base_model, ensure_embedder
from bench import script
from bench.page.report import console, report
from evaluation.intervals import compare_together
from evaluation.methods import ADAPTERS, METHODS, Method, parse_methods
from evaluation.session import EvalInputs, EvalOptions, evaluate
from evaluation.studies import mta
from evaluation.studies.primary import Losses, mean_losses
from server.settings import load_settings

ANCHORS = {"blogs": 30, "c50": 30, "mail": 22, "news_headline": 26}
"""Number of anchors of each kind, those with the longest histories."""

OTHERS = {"blogs": 12, "c50": 9, "mail": 12, "news_headline": 12}
MOST_ITEMS = {"news_headline": 40}
"""Number of a person's last items in use: some authors have ten times as many as a reporter."""

BUILD = "--anchors-by longest --directions 0 --common-steps 64 --common-batch-size 8 --steps 4 --history-share 0"

People = list[dict[str, Any]]


def main(
    data: Annotated[Path, typer.Option(help="Folder of the real histories.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder for people, bank and records.")] = Path("out/mixed"),
    seed: Annotated[int, typer.Option(help="Seed of the rows.")] = 1,
) -> None:
    """Build, evaluate, and print losses and differences of each kind."""
    out.mkdir(parents=True, exist_ok=True)
    for name, counts in (("anchors", ANCHORS), ("users", OTHERS)):
        mixed = [person for kind, count in counts.items() for person in people(data / kind / f"{name}.json", count)]
        (out / f"{name}.json").write_text(json.dumps(mixed), "utf-8")
    mta("bank", "build", "--users", out / "anchors.json", "--task", "chat", "--anchors", sum(ANCHORS.values()),
        *BUILD.split(), "--no-verdict", "--seed", seed, "--out", out / "bank")  # fmt: skip
    METHODS["kind"] = Method("kind")
    ADAPTERS["kind"] = lambda of, user, _: of.equal(places(ANCHORS)[kind_of(user.user.user_id)])
    settings = load_settings()
    embedder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    model = ensure_base_model(settings.model, settings.cache_dir)
    methods = tuple(parse_methods("common,mean,kind,merged:topic,merged"))
    inputs = EvalInputs(out / "users.json", out / "bank", out, model, embedder)
    with Progress(console=console()) as progress:
        bar = progress.add_task("evaluating", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        evaluate(inputs, EvalOptions(methods, predict=False), AdaptConfig(), show)
    report("Losses, and differences, nats a token", list(rows(mean_losses([out]))), None)


def people(path: Path, count: int) -> People:
    """Return the people of a kind with the longest histories, longest first, as people of the task `chat`."""
    kind = path.parent.name
    most = MOST_ITEMS.get(kind, 0)

    def chat(item: Mapping[str, str]) -> dict[str, str]:
        if kind == "news_headline":
            task = get_task(kind)
            return {"id": item["id"], "input": task.input.format(**item), "output": task.output.format(**item)}
        return {name: item[name] for name in ("id", "input", "output")}

    found = [
        {
            "user_id": f"{kind}-{person['user_id']}",
            "profile": [chat(item) for item in person["profile"][-most:]],
            "query": person.get("query", []),
        }
        for person in json.loads(path.read_text("utf-8"))
    ]
    return sorted(found, key=lambda person: -len(person["profile"]))[:count]


def places(counts: Mapping[str, int]) -> dict[str, range]:
    """Return the places of each kind's anchors in the bank."""
    ends = zip(counts.items(), accumulate(counts.values()), strict=True)
    return {kind: range(end - count, end) for (kind, count), end in ends}


def kind_of(user_id: str) -> str:
    return user_id.partition("-")[0]


def rows(losses: Losses) -> Iterator[tuple[str, str]]:
    """Yield losses by method and what `merged` is below the others, for each kind and for all."""
    for kind in (*OTHERS, ""):
        users = [user for user in losses["merged"] if user.startswith(kind)]
        means = {method: fmean(of[user] for user in users) for method, of in losses.items()}
        yield kind or "all", ", ".join(f"{method} {mean:.3f}" for method, mean in means.items())
        others = [method for method in losses if method != "merged"]
        less = {other: [losses["merged"][user] - losses[other][user] for user in users] for other in others}
        for other, interval in compare_together(less).items():
            yield f"{kind or 'all'}: merged less {other}", str(interval)


if __name__ == "__main__":
    script(main)
