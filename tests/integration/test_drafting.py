"""`mta bank drafts`: another server writes the drafts of people's texts; a run that was stopped continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bank.building.drafting import PROMPT, Drafter, made_by
from bank.errors import BankError
from bank.items.drafts import notes_of
from bank.items.histories import read_histories
from bank.items.tasks import get_task
from server.cli import app
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread

REWRITE = get_task("rewrite")
TEXTS = {
    "rosa": ["Sowed beans by the gate this morning.", "Rain again, so the seedlings stay indoors today."],
    "a/b": ["Sailed past the light house at noon."],
}
Drafts = Callable[..., Result]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "drafts"


@pytest.fixture
def drafts(tmp_path: Path, out: Path) -> Drafts:
    """Run the command on `TEXTS`, or others, with a gateway as the server that is asked."""

    def run(
        server: GatewayThread, *, model: str = "base", task: str = "rewrite", yes: bool = True, texts: Any = TEXTS
    ) -> Result:
        people = [{"user_id": who, "profile": [{"text": text} for text in own]} for who, own in texts.items()]
        (users := tmp_path / "users.json").write_text(json.dumps(people))
        asked = ("--users", str(users), "--drafts-by", f"{server.url}/v1", "--out", str(out))
        chosen = ("--drafts-model", model, "--task", task, *["--yes"] * yes)
        return CliRunner().invoke(app, ["bank", "drafts", *asked, *chosen], input="n\n")

    return run


def written(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for file in sorted(out.glob("*/items.jsonl")) for line in file.read_text().splitlines()]


def pairs(out: Path) -> dict[str, list[tuple[str, str]]]:
    return {person.user_id.replace("%2F", "/"): person.pairs(REWRITE) for person in read_histories(out, REWRITE)}


def pair(text: str, draft: str) -> tuple[str, str]:
    return REWRITE.input.format(draft=draft), text


def test_a_draft_that_does_not_end_is_none(gateway_over_vllm: GatewayThread, drafts: Drafts, out: Path) -> None:
    done = drafts(gateway_over_vllm)  # a random model's answers never end
    assert done.exit_code == 0, done.output
    assert "0 drafts are in" in done.output and "3 were refused or did not end" in done.output
    assert pairs(out) == {who: [pair(text, notes_of(text)) for text in own] for who, own in TEXTS.items()}


def test_a_password_in_the_url_is_refused() -> None:
    with pytest.raises(BankError, match="before @") as caught:
        Drafter("https://rosa:secret@example.com/v1", "base")
    assert "secret" not in str(caught.value)
    assert Drafter("https://example.com/@rosa/v1", "base").record["drafts_by"] == "https://example.com/@rosa/v1"


class TestAnotherServer:
    @pytest.fixture
    def fake_engine(self, fake_engine: FakeEngine) -> FakeEngine:
        fake_engine.turn(finish_reasons=("stop",))
        return fake_engine

    def test_a_text_and_its_draft_are_a_pair(
        self, gateway: GatewayThread, fake_engine: FakeEngine, drafts: Drafts, out: Path
    ) -> None:
        done = drafts(gateway)
        assert "3 texts of 2 people, 121 bytes" in done.output and "3 drafts are in" in done.output
        made = {item["text"]: item["draft"] for item in written(out)}
        assert pairs(out) == {who: [pair(text, made[text]) for text in own] for who, own in TEXTS.items()}
        assert made_by(out)["drafts_prompt"] == PROMPT

    def test_a_second_run_asks_nothing(
        self, gateway: GatewayThread, fake_engine: FakeEngine, drafts: Drafts, out: Path
    ) -> None:
        assert drafts(gateway).exit_code == 0
        before, asked = written(out), len(fake_engine.seen)
        file = out / "rosa" / "items.jsonl"
        file.write_bytes(file.read_bytes()[:-9])  # as a kill leaves it
        assert drafts(gateway).exit_code == 0
        assert (written(out), len(fake_engine.seen)) == (before, asked + 1)

    def test_what_is_refused_has_its_notes(
        self, gateway: GatewayThread, fake_engine: FakeEngine, drafts: Drafts, out: Path
    ) -> None:
        long = " ".join(["beans"] * 200)  # beyond the fake engine's context
        for _ in range(2):  # another run counts alike
            done = drafts(gateway, texts={"rosa": [long, *TEXTS["rosa"]]})
            assert "2 drafts are in" in done.output and "1 were refused or did not end" in done.output
        assert [item["id"] for item in written(out) if "draft" not in item] == [written(out)[0]["id"]]

    def test_a_busy_server_is_asked_again(
        self, gateway: GatewayThread, fake_engine: FakeEngine, drafts: Drafts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_engine.turn(status=503)
        monkeypatch.setattr("bank.building.drafting.sleep", lambda pause_s: fake_engine.turn(status=None))
        assert "3 drafts are in" in drafts(gateway).output

    def test_an_unknown_model_ends_the_run(
        self, gateway: GatewayThread, fake_engine: FakeEngine, drafts: Drafts
    ) -> None:
        done = drafts(gateway, model="gpt-0")
        assert done.exit_code == 1 and not fake_engine.seen
        assert "gave no draft (status 404" in str(done.exception) and "'gpt-0'" in str(done.exception)

    def test_another_models_drafts_stay(self, gateway: GatewayThread, fake_engine: FakeEngine, drafts: Drafts) -> None:
        assert drafts(gateway).exit_code == 0
        done = drafts(gateway, model="mta")
        assert done.exit_code == 1 and "holds drafts by base of" in str(done.exception)

    def test_nothing_is_sent_without_a_yes(
        self, gateway: GatewayThread, fake_engine: FakeEngine, drafts: Drafts, out: Path
    ) -> None:
        assert drafts(gateway, yes=False).exit_code == 1
        assert not fake_engine.seen and not out.exists()

    def test_a_task_without_drafts_is_refused(self, gateway: GatewayThread, drafts: Drafts) -> None:
        refusal = drafts(gateway, task="chat").exception
        assert "the task chat has no drafts: use --task rewrite" in str(refusal)
