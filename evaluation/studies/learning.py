"""Predict, then learn: people's own later texts, in order, as what they send instead of the server's answers.

    python -m evaluation.studies.learning --bank BANK --users DATA/blogs/users.json --history 1 --out FOLDER

starts `mta up`. Everybody begins with an empty profile. Before each of a person's texts, its loss is read from
`/v1/completions` (`echo`, `logprobs`) under the base model, under the common row, which is trained on all anchors and
knows no person, and under what the server serves; each alone and with the most relevant of the texts so far in the
prompt. Then the person asks, and sends their own text as feedback. People are
adapted again after `--refresh` texts. Whoever is done is kept in `FOLDER/people-….jsonl`: a run that was stopped goes
on with the others.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import httpx
import typer
from rich.progress import Progress

from adapters.training.example import Example
from bank.items.histories import read_histories
from bank.items.lessons import encode_with_memories
from bank.items.profile import Item
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task, get_task
from bank.manifest import read_manifest
from bank.models.folders import ensure_base_model
from bench import script
from bench.page.report import Figures, tabulate
from bench.rig.up import up
from evaluation.intervals import over_users
from mta_client import Client
from server.gateway.users.profiles import SIGNED_AT
from server.settings import load_settings

WAYS = ("base", "common", "served", "base+history", "common+history", "served+history")
PAIRS = (
    *(("common", "base"), ("base+history", "base"), ("served", "base+history"), ("served", "common")),
    *(("served+history", "common+history"), ("served+history", "base+history")),
)
AT_ONCE = 6  # people at a time: some wait for training while others are read
MAX_TOKENS = 512  # longest example; past texts that do not fit are left out
SIGNED_S = 120.0  # longest wait for a person's new recipe
_POLL_S = 0.5
_ANSWER_TOKENS = 8  # an answer only has to be there


@dataclass(slots=True)
class Learner:
    """A person: their texts as (input, output), and what was read before each."""

    user_id: str
    texts: Sequence[tuple[str, str]]
    losses: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})  # nats per token
    levels: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)  # how their training jobs ended


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads losses and gives feedback over the HTTP API."""

    http: httpx.Client
    client: Client
    tokenizer: Any
    task: Task
    history: int

    def learn(self, person: Learner, on_text: Callable[[], object]) -> None:
        """Let the server learn from a person's texts, one after the other, and read the losses before each."""
        for position in range(len(person.texts)):
            self._read(person, position)
            on_text()
            if position + 1 < len(person.texts):
                self._teach(person, position)

    def _read(self, person: Learner, position: int) -> None:
        turn, text = person.texts[position]
        past = [
            Item(f"{number}", {"input": asked, "output": said}) for number, (asked, said) in enumerate(person.texts)
        ]
        memories = ItemIndex(self.task, past[:position]).memories(turn, self.history) if position else []
        for way in WAYS:
            shown = memories if way.endswith("+history") else ()
            example = encode_with_memories(self.tokenizer, self.task, turn, text, memories=shown, max_tokens=MAX_TOKENS)
            loss, level = self._loss(person.user_id, way.partition("+")[0], example)
            person.losses[way].append(loss)
        person.levels.append(level)

    def _teach(self, person: Learner, position: int) -> None:
        """Send a text instead of an answer, and wait for the signature and the training that it brings."""
        turn, text = person.texts[position]
        before = self.client.user(person.user_id).recipe if position else ""
        asked = {"user_id": person.user_id, "prompt": turn, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
        answer = self._post("/generate", asked)
        said = {"answer": answer["id"], "input": turn, "text": answer["text"], "final": text}
        job = self._post(f"/users/{person.user_id}/feedback", said)["job"]
        if position + 1 in SIGNED_AT:
            self._until_signed(person.user_id, before)
        if job:
            person.jobs.append(f"{self.client.wait(job, timeout_s=3600, poll_s=_POLL_S).state}")

    def _until_signed(self, user_id: str, before: str) -> None:
        """Wait for the recipe of a new signature, in vain if it is the same as `before`."""
        until_s = time.monotonic() + SIGNED_S
        while time.monotonic() < until_s:
            user = self.client.user(user_id)
            if user.source == "signature" and user.recipe != before:
                return
            time.sleep(_POLL_S)

    def _loss(self, user_id: str, way: str, example: Example) -> tuple[float, str]:
        """Return the mean loss of the output's tokens, and the level that read it."""
        asked = {"prompt": list(example.ids), "echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0}
        who = {"model": "base"} if way == "base" else {"user": user_id, "strength": 0 if way == "common" else 1}
        answer = self._post("/v1/completions", asked | who)
        logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert len(logprobs) == len(example.ids)
        return -fmean(logprobs[example.loss_from :]), answer["personalization"]["level"]

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.post(path, json=body).raise_for_status().json()
        return answer


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank that none of the people is in.")],
    users: Annotated[Path, typer.Option(help="People; their items and then their queries are their texts.")],
    history: Annotated[int, typer.Option(help="Past texts in the prompt.", min=1)] = 1,
    refresh: Annotated[int, typer.Option(help="Adapt people after so many texts; 0: never.", min=0)] = 8,
    people: Annotated[int | None, typer.Option(help="At most N people.")] = None,
    texts: Annotated[int | None, typer.Option(help="At most N texts of each.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures and picture.")] = Path("out/learning"),
) -> None:
    """Report the loss by the number of texts that the server has learnt from."""
    manifest, settings = read_manifest(bank), load_settings()
    task = get_task(manifest.task)
    out.mkdir(parents=True, exist_ok=True)
    learners = []
    for known in read_histories(users, task, queries=True)[:people]:
        said = [*known.pairs(task), *((query.input, query.gold) for query in known.queries)]
        learners.append(Learner(known.user_id, said[:texts]))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ensure_base_model(settings.model, settings.cache_dir))
    environment = {"MTA_REFRESH_SAMPLES": str(refresh), "MTA_REFRESH_HOURS": "0"}
    with (
        tempfile.TemporaryDirectory() as scratch,
        up(Path(scratch), "--bank", str(bank), environment=environment) as ran,
        httpx.Client(base_url=ran.url, timeout=600) as http,
        Client(ran.url) as client,
    ):
        _learn(
            learners,
            Reader(http, client, tokenizer, task, history),
            out / f"people-{manifest.short}-{history}-{refresh}-{texts}.jsonl",
        )
    states = [state for person in learners for state in person.jobs]
    tabulate([table(learners)], out / "learning.json", people=[asdict(person) for person in learners])
    typer.echo(
        f"training jobs: {', '.join(f'{states.count(state)} {state}' for state in sorted(set(states))) or 'none'}"
    )
    picture(learners).savefig(out / "loss_by_texts.png", dpi=150)
    typer.echo(f"written: {out / 'loss_by_texts.png'}")


def _learn(learners: list[Learner], reader: Reader, done: Path) -> None:
    """Let the server learn from everybody who is not `done`; their readings replace what `learners` holds of them."""
    known = {person.user_id: person for person in map(_decoded, done.read_text().splitlines())} if done.exists() else {}
    learners[:] = [known.get(person.user_id, person) for person in learners]
    left = [person for person in learners if person.user_id not in known]
    with Progress() as progress, ThreadPoolExecutor(AT_ONCE) as pool:
        bar = progress.add_task("texts", total=sum(len(person.texts) for person in left))
        running = {pool.submit(reader.learn, person, partial(progress.advance, bar)): person for person in left}
        for ended in as_completed(running):
            ended.result()
            with done.open("a") as file:
                file.write(json.dumps(asdict(running[ended])) + "\n")


def _decoded(line: str) -> Learner:
    return Learner(**json.loads(line))


def table(learners: Sequence[Learner]) -> Figures:
    """Return the mean losses and, over people, the differences that matter, by the number of texts learnt from.

    Nothing is shown of the first text: a person without a profile is served by the base model in every way.
    """
    lines: list[Sequence[Any]] = []
    for first, last in ((1, 4), (4, 8), (8, 12), (12, 16)):
        kept = [person for person in learners if len(person.texts) > first]
        if not kept:
            break
        means = {way: [fmean(person.losses[way][first:last]) for person in kept] for way in WAYS}
        gains = [
            str(over_users([a - b for a, b in zip(means[one], means[other], strict=True)])) for one, other in PAIRS
        ]
        levels = [level for person in kept for level in person.levels[first:last]]
        fractions = ", ".join(f"{levels.count(level) / len(levels):.0%} {level}" for level in dict.fromkeys(levels))
        lines.append((f"{first} to {last - 1}", *(f"{fmean(means[way]):.3f}" for way in WAYS), *gains, fractions))
    columns = ("texts learnt from", *WAYS, *(f"{one} less {other}" for one, other in PAIRS), "levels")
    return Figures("Loss of the next text, nats a token", columns, lines)


def picture(learners: Sequence[Learner]) -> Any:
    """Draw what knowing the person adds to the common row, by the number of texts learnt from."""
    from bench.page.pictures import panels_in_a_row

    figure, (axis,) = panels_in_a_row(1, width=6.4, height=3.6)
    rounds = range(1, max(len(person.texts) for person in learners))
    for one, other in (("served", "common"), ("served+history", "common+history")):
        gains = [
            over_users(
                [p.losses[one][position] - p.losses[other][position] for p in learners if position < len(p.texts)]
            )
            for position in rounds
        ]
        axis.plot(rounds, [gain.mean for gain in gains], label=f"{one} less {other}")
        axis.fill_between(rounds, [gain.low for gain in gains], [gain.high for gain in gains], alpha=0.15)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_xlabel("texts learnt from")
    axis.set_ylabel("nats a token")
    axis.legend()
    return figure


if __name__ == "__main__":
    script(main)
