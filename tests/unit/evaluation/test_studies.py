"""What is evaluated on whom, and tables over several evaluations."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import typer

from evaluation.methods import parse_methods
from evaluation.run import RECORDS_FILE, Record
from evaluation.studies import __main__ as quality
from evaluation.studies import mixed, primary
from evaluation.studies.ratings import judged


def test_mail_study_writes_texts_and_the_callers_option_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MagicMock(return_value=subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(subprocess, "run", run)
    quality.main(data=tmp_path, task="mail", out=tmp_path, seeds=1, evaluate="--write merged")
    build, evaluation = (call.args[0][3:] for call in run.call_args_list)
    assert (build[:2], evaluation[0]) == (["bank", "build"], "eval")
    written = [evaluation[place + 1] for place, word in enumerate(evaluation) if word == "--write"]
    assert written[-1] == "merged"
    assert set(parse_methods(written[0])) <= set(parse_methods(evaluation[evaluation.index("--methods") + 1]))


def test_habit_moves_scores_by_its_ratio_to_the_shares_of_all() -> None:
    def record(method: str, *chances: float) -> Record:
        return Record("u", "q", method, 0, 0.0, None, "5", chances=chances)

    habit, model = (0.1, 0.1, 0.1, 0.1, 0.6), (0.1, 0.0, 0.1, 0.0, 0.2)  # of 0.4 for scores at all
    everybody = dict(zip("12345", (0.2, 0.2, 0.1, 0.2, 0.3), strict=True))
    errors, losses = judged([record("prior", *habit), record("common", *model)], everybody)
    assert errors["prior"]["u"] == [pytest.approx(1.0)]
    assert errors["common"]["u"] == [pytest.approx(5 - (1 + 3 + 2 * 5) / 4)]
    assert losses["common"]["u"] == [pytest.approx(-math.log(0.5) / 2)]
    assert losses["common+prior"]["u"] == [pytest.approx(-math.log(1.0 / (0.125 + 0.25 + 1.0)) / 2)]
    assert set(losses) == {"prior", "common", "common+prior"}


def test_primary_difference_is_a_mean_over_banks_and_corrected(tmp_path: Path) -> None:
    for bank, gain in enumerate((0.1, 0.3)):
        (tmp_path / f"bank-{bank}").mkdir()
        lines = [
            asdict(Record(f"u{user}", "q", method, 0, 3.0 + user - gain * (method == "merged"), None, ""))
            for user, method in itertools.product(range(6), ("mean", "merged:topic", "merged"))
        ]
        (tmp_path / f"bank-{bank}" / RECORDS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = f"mail={tmp_path / 'bank-0'},{tmp_path / 'bank-1'}"
    primary.main(runs=[run], histories="", out=tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows.keys() == {"mail: merged less mean", "mail: merged less merged:topic"}
    assert set(rows.values()) == {"-0.2000 (-0.2000 to -0.2000, 6 users), lower for 6; p 0.062"}  # twice 1 of 32
    for wrong, why in (("mail=", "in ''"), (f"mail={tmp_path}", f"no {RECORDS_FILE}")):
        with pytest.raises(typer.BadParameter, match=why):
            primary.main(runs=[wrong])
    with pytest.raises(typer.BadParameter, match="mail has no own"):
        primary.main(runs=[run], histories="", against="own")


def test_mixed_bank_takes_the_longest_and_is_judged_by_kind(tmp_path: Path) -> None:
    def written(kind: str, *histories: list[dict[str, str]]) -> Path:
        path = tmp_path / kind / "anchors.json"
        path.parent.mkdir()
        path.write_text(json.dumps([{"user_id": f"u{n}", "profile": items} for n, items in enumerate(histories)]))
        return path

    talk, article = {"id": "i", "input": "Hello", "output": "Hi"}, {"id": "i", "title": "Roses", "text": "They grow."}
    mails = mixed.people(written("mail", [talk], [talk] * 3, [talk] * 3), 2)
    assert [(person["user_id"], len(person["profile"])) for person in mails] == [("mail-u1", 3), ("mail-u2", 3)]
    (author,) = mixed.people(written("news_headline", [article] * 50), 1)
    asked = "Generate a headline for the following article: They grow."
    assert author["profile"] == [{"id": "i", "input": asked, "output": "Roses"}] * 40
    assert mixed.places({"mail": 2, "news_headline": 1}) == {"mail": range(2), "news_headline": range(2, 3)}
    users = [f"{kind}-{n}" for kind in mixed.OTHERS for n in range(6)]
    losses = {"kind": dict.fromkeys(users, 2.0), "merged": dict.fromkeys(users, 1.0) | dict.fromkeys(users[6:], 1.5)}
    rows = dict(mixed.rows(losses))
    assert rows["blogs"] == "kind 2.000, merged 1.000"
    assert rows["mail: merged less kind"] == "-0.5000* (-0.5000 to -0.5000, 6 users)"
    assert rows["all"] == "kind 2.000, merged 1.375"


def test_last_record_of_a_query_counts_in_one_evaluation(tmp_path: Path) -> None:
    def losses(*records: Record) -> primary.Losses:
        (tmp_path / RECORDS_FILE).write_text("".join(f"{json.dumps(asdict(record))}\n" for record in records))
        return primary.mean_losses([tmp_path])

    ada, again = (Record("ada", "q", "merged", 0, loss, None, "", key="k1") for loss in (3.0, 2.0))
    bob = Record("bob", "q", "merged", 0, 4.0, None, "", key="k2")  # people who were added later have another key
    assert losses(ada, again, bob) == {"merged": {"ada": 2.0, "bob": 4.0}}
    for other in (replace(ada, seed=1), replace(ada, query_id="other"), replace(ada, method="mean")):
        losses(ada, bob, replace(other, key="k2"))
    with pytest.raises(typer.BadParameter, match="merged of ada by evaluations with different"):
        losses(ada, bob, replace(ada, key="k2"))
