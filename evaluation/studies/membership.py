"""Do a bank and a few-shot adapter tell whose texts they were trained on? A membership test by loss.

    python -m evaluation.studies.membership --bank BANK --members anchors.json --others users.json

A text's score is by how much an adapter lowers its loss, in nats per token; the base model's loss calibrates it, since
some texts are easy for any model (LoRA-Leak, arXiv 2507.18302). Whoever attacks calls a text a member if its score is
above a threshold. AUC is the chance that a member's score is above another's (0.5 is a guess), with an interval over
people. `found at 1 %` is the share of members above the score that 1 % of the others exceed; of fewer than 100, none.

The bank: members are texts of `--members`, the file that the bank was built from, without those whom the build left out
(`--no-verdict` leaves out nobody); the others are people of `--others`, whom it has not seen. Lines `people` score each
person by the mean of their texts. Each is read with the common row, and as themselves (`merged`), so that an anchor
meets their own row. Texts of the two files should be alike otherwise, or the test tells the files apart.

A few-shot adapter: of the people in `--others` with enough texts, each is adapted as in serving. Members are the texts
that the adapter was trained on, the others the same person's later texts, or another person's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.progress import track
from scipy.stats import mannwhitneyu

from adapters.training.adapt_config import default_config
from bank.errors import BankError
from bank.items.histories import History, read_histories
from bank.items.prompt import encode_pair
from bank.lookup.embedder import Embedder
from bank.models.folders import check_base_model, ensure_base_model, ensure_embedder
from bank.models.load import load_base, resolve_dtype
from bench import script
from bench.page.report import Figures, console, tabulate
from evaluation.methods import METHODS, Evaluator
from evaluation.scoring import EvalAdapter, OpenBank, Scorer
from server.settings import load_settings

COLUMNS = ("adapter, compared with", "members", "others", "AUC", "from", "to", "found at 1 %", "found at 10 %")
DRAWS = 500  # of people, for an interval
Pairs = Sequence[tuple[str, str]]
Losses = npt.NDArray[np.float64]  # of texts, in nats per token; or differences of them


@dataclass(slots=True)
class Scores:
    """The scores of each person's texts."""

    members: list[Losses] = field(default_factory=list)
    others: list[Losses] = field(default_factory=list)

    def by_person(self) -> Scores:
        return Scores(*([one.mean(keepdims=True) for one in side] for side in (self.members, self.others)))

    def line(self, name: str) -> list[object]:
        members, others = np.concatenate(self.members), np.concatenate(self.others)
        highest = np.sort(others)[::-1]
        fractions = [float((members > highest[int(fraction * len(highest))]).mean()) for fraction in (0.01, 0.1)]
        low, high = self._interval()
        return [name, len(members), len(others), auc(members, others), low, high, *fractions]

    def _interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the AUC over people, by the bootstrap's percentiles."""
        rng, both, drawn = np.random.default_rng(0), (self.members, self.others), list[float]()
        for _ in range(DRAWS):
            sides = ([side[at] for at in rng.integers(len(side), size=len(side))] for side in both)
            drawn.append(auc(*map(np.concatenate, sides)))
        low, high = np.percentile(drawn, (2.5, 97.5))
        return float(low), float(high)


def auc(members: Losses, others: Losses) -> float:
    return float(mannwhitneyu(members, others).statistic) / (len(members) * len(others))


@dataclass(frozen=True, slots=True)
class Attack:
    evaluator: Evaluator

    def losses(self, adapter: EvalAdapter | None, pairs: Pairs) -> Losses:
        tokenizer, most = self.evaluator.scorer.tokenizer, self.evaluator.max_tokens
        examples = [encode_pair(tokenizer, *pair, most) for pair in pairs]
        return np.array([reading.loss for reading in self.evaluator.scorer.read(adapter, examples)])

    def of_bank(self, person: History) -> dict[str, Losses]:
        """Return the scores of a person's texts, by adapter and what it is compared with."""
        bank, evidence = self.evaluator.bank, self.evaluator.evidence(person)
        names = ["base", *["common"] * bank.manifest.common, "merged:topic", "merged"]
        pairs = person.pairs(bank.serving.task)
        losses = {name: self.losses(self.evaluator.adapter(METHODS[name], evidence, 0), pairs) for name in names}
        compared = [(name, "base") for name in names[1:]]
        compared += [("merged", "common")] if bank.manifest.common else []
        return {f"{name}, {other}": losses[other] - losses[name] for name, other in compared}

    def of_few_shot(self, person: History, stranger: History) -> dict[str, Scores]:
        """Return the scores of what a person's adapter was trained on and of other texts; none without an adapter."""
        task = self.evaluator.bank.serving.task
        adapter = self.evaluator.adapter(METHODS["stacked"], self.evaluator.evidence(person), 0)
        if adapter is None or adapter.trained is None:
            return {}
        trained, scores = person.pairs(task), dict[str, Scores]()
        for other, beneath in (("base", None), ("merged", replace(adapter, trained=None))):
            for whose, texts in (("own later texts", asked(person)), ("another person's", asked(stranger))):
                sides = [[self.losses(beneath, each) - self.losses(adapter, each)] for each in (trained, texts)]
                scores[f"few-shot, {other}; others: {whose}"] = Scores(*sides)
        return scores


def asked(person: History) -> Pairs:
    return [(query.input, query.gold) for query in person.queries]


def main(
    *,
    bank: Annotated[Path, typer.Option(help="The bank.", exists=True)],
    members: Annotated[Path, typer.Option(help="People the bank was built from.", exists=True)],
    others: Annotated[Path, typer.Option(help="People whom it has not seen.", exists=True)],
    people: Annotated[int | None, typer.Option(help="At most so many people of each file.", min=1)] = None,
    texts: Annotated[int, typer.Option(help="Each person's newest texts, for the bank's test.", min=1)] = 16,
    adapted: Annotated[int, typer.Option(help="At most so many people get a few-shot adapter.", min=0)] = 24,
    profile: Annotated[int, typer.Option(help="Texts that it is trained on.", min=2)] = 10,
    later: Annotated[int, typer.Option(help="Later texts of the same person.", min=1)] = 6,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Attack a bank and few-shot adapters."""
    settings = load_settings()
    embedder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    opened = OpenBank.open(bank, embedder.id)
    built_for, task = opened.manifest.base_model, opened.serving.task
    folder = ensure_base_model(settings.model, settings.cache_dir, built_for, settings.chat_template)
    check_base_model(folder, {bank: opened.manifest})
    scorer = Scorer(*load_base(folder, resolve_dtype(settings.dtype)))
    config = default_config(opened.manifest.room)
    attack = Attack(Evaluator(bank=opened, scorer=scorer, embedder=embedder, config=config))
    known, unknown = (
        [person for person in read_histories(path, task)[:people] if person.pairs(task)] for path in (members, others)
    )
    if not known or not unknown or {one.user_id for one in known} & {one.user_id for one in unknown}:
        raise BankError(f"{members} and {others} must have people with pairs of the task {task.name}, nobody in both")
    scores = defaultdict[str, Scores](Scores)
    for person in track([*known, *unknown], "reading with the bank", console=console()):
        for name, found in attack.of_bank(replace(person, items=person.items[-texts:])).items():
            (scores[name].members if person in known else scores[name].others).append(found)
    lines = [each.line(name) for name, each in scores.items()]
    lines += [each.by_person().line(f"{name}; people") for name, each in scores.items()]
    long = [one for one in unknown if len(one.pairs(task)) == len(one.items) >= profile + later]
    long = long[: adapted if opened.manifest.room and len(long) > 1 else 0]
    split = [person.with_queries(task, later, profile) for person in long]
    few_shot, promoted = defaultdict[str, Scores](Scores), 0
    for position, person in enumerate(track(split, "adapting", console=console())):
        made = attack.of_few_shot(person, split[position - 1])
        promoted += bool(made)
        for name, each in made.items():
            few_shot[name].members += each.members
            few_shot[name].others += each.others
    lines += [each.line(name) for name, each in few_shot.items()]
    title = f"{bank}: {len(known)} members, {len(unknown)} others; {promoted} of {len(split)} adapters promoted"
    tabulate([Figures(title, COLUMNS, lines)], out, bench="membership")


if __name__ == "__main__":
    script(main)
