"""Settings: where they come from, how faults are named, and what is never shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.errors import MtaError
from server.cli import app, run
from server.settings import GROUPS, Settings, load_settings


def test_options_go_before_the_environment_and_none_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_PORT", "8100")
    monkeypatch.setenv("MTA_TENANT", "acme")
    settings = load_settings(port=8200, tenant=None)
    assert (settings.port, settings.tenant) == (8200, "acme")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("MTA_PORT", "http"), ("MTA_PORT", "70000"), ("MTA_PROFILE_ITEMS", "0"), ("MTA_DTYPE", "int4")),
        ("MTA_PROFILE_BYTES", "65535"),  # the largest item would not fit
        *(("MTA_DEFAULT_SAMPLING", "0.2"), ("MTA_DEFAULT_SAMPLING", "temperature=0")),
        *(("MTA_USER_HEADERS", ",,"), ("MTA_USER_HEADERS", "X-User-ID, X User"), ("MTA_USER_HEADERS", "X-Größe")),
    ],
)
def test_a_value_that_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(MtaError) as caught:
        load_settings()
    assert variable in str(caught.value)
    assert value in str(caught.value)


def test_a_wrong_value_within_a_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_DEFAULT_SAMPLING", '{"temperature": 3}')
    with pytest.raises(MtaError, match=r"^MTA_DEFAULT_SAMPLING\.temperature: .*, got 3"):
        load_settings()


BUILDS = ("bank build --users people --task chat --out bank", "bank import adapter --profiles people --out bank")


@pytest.mark.parametrize("command", ["models", "engine", "settings", "bank info", *BUILDS])
def test_every_command_names_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("MTA_PORT", "abc")
    monkeypatch.setattr("sys.argv", ["mta", *command.split()])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: MTA_PORT: ")


@pytest.mark.parametrize(
    ("variable", "nearest"), [("MTA_TENNANT", "MTA_TENANT"), ("mta_prot", "MTA_PORT"), ("MTA_", "MTA_")]
)
def test_unknown_variable_is_an_error_that_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, variable: str, nearest: str
) -> None:
    monkeypatch.setenv(variable, "")
    with pytest.raises(MtaError, match=f"^{variable.upper()} is not a setting. Did you mean {nearest}"):
        load_settings()


def test_what_compose_alone_reads_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    read = set(re.findall(r"\bMTA_[A-Z0-9_]+", (Path(__file__).parents[2] / "docker-compose.yml").read_text("utf-8")))
    assert "MTA_BANK_DIR" in read
    for variable in read - {"MTA_DTYPE", "MTA_PORT"}:
        monkeypatch.setenv(variable, "1")
    load_settings()


def test_every_engine_is_asked_by_itself() -> None:
    assert Settings(engine_url="http://router:8001/").engines == ("http://router:8001",)
    assert Settings(engine_urls=" http://a:1/, http://b:2 ,").engines == ("http://a:1", "http://b:2")


def test_the_headers_that_may_name_a_user_are_kept_in_order() -> None:
    assert Settings().user_header_names == ("X-User-ID",)
    assert Settings(user_headers=" X-Chat_User,X-User-ID ,").user_header_names == ("X-Chat_User", "X-User-ID")


def test_what_cannot_do_without_a_bank_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTA_BANK", raising=False)
    one, two = Path("/one"), Path("/two")
    assert Settings(bank=one).bank_folder() == one
    assert Settings(bank=one).banks == (one,)
    assert Settings(bank=one, next_bank=two).banks == (one, two)
    with pytest.raises(MtaError, match="set MTA_BANK"):
        Settings().bank_folder()
    with pytest.raises(MtaError, match="set MTA_BANK"):
        _ = Settings(next_bank=two).banks


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        *((f"{user}hush@s:63/0", f"{user.partition(':')[0]}:***@s:63/0") for user in ("u:", ":", "u:hush@", "u:hush:")),
        ("s/0?password=hush&db=1", "s/0?password=***&db=1"),
        ("s/0?sentinel_password=hush", "s/0?sentinel_password=***"),
    ],
)
def test_the_command_lists_all_settings_and_shows_no_secret(
    url: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MTA_API_KEY", "MTA_FIRST_KEY", "MTA_SECRET", "MTA_ENGINE_KEY"):
        monkeypatch.setenv(name, "unmistakable-secret")
    monkeypatch.setenv("MTA_REDIS_URL", "redis://" + url.replace("hush", "unmistakable"))
    result = CliRunner().invoke(app, ["settings"])
    assert result.exit_code == 0
    for name in Settings.model_fields:
        assert f"MTA_{name.upper()}" in result.output
    assert f"redis://{shown}\n" in result.output
    assert "unmistakable" not in result.output


def test_settings_are_listed_by_group_within_a_terminal() -> None:
    lines = CliRunner().invoke(app, ["settings"], env={"COLUMNS": "80"}).output.splitlines()
    assert max(len(line) for line in lines if line.startswith(" ")) <= 80
    titles = [line for line in lines if line and line[0] not in " M"]
    assert titles == list(GROUPS.values())
    assert lines.index("MTA_BANK") < lines.index(titles[1]) < lines.index("MTA_HOST = 127.0.0.1")
