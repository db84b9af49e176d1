"""Options made of a dataclass: each field is one, with its default, its help and its limits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from adapters.recipe import FusionMethod
from bank.building.options import COUNT, RATE, BuildOptions, ImportOptions, Option, check_limits, options_of
from bank.errors import BankError
from bank.rules import PosteriorRule, SignatureRule, WeightRule
from server.cli import app
from server.cli.bank.options import with_options
from server.cli.bank.tables import _rule


@dataclass(frozen=True, slots=True)
class Cake:
    """An example."""

    taste: Annotated[str, Option("Of what it tastes.")]
    layers: Annotated[int, Option("How many layers.", COUNT)] = 3
    sugar: Annotated[float | None, Option("How much sugar.", RATE, shown_default="as you like")] = None
    toppings: Annotated[tuple[str, ...] | None, Option("What is on it.")] = None
    method: Annotated[FusionMethod, Option("How it is put together.")] = FusionMethod.CAT
    warm: Annotated[bool, Option("Out of the oven.")] = True

    def __post_init__(self) -> None:
        check_limits(self)


def bake(*arguments: str) -> tuple[Cake, int]:
    """What a command gets when it is called so."""
    baked = []
    kitchen = typer.Typer()

    @kitchen.command()
    @with_options
    def cake(*, options: Cake, oven: Annotated[int, typer.Option()] = 1) -> None:
        baked.append((options, oven))

    result = CliRunner().invoke(kitchen, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return baked[0]


def test_what_is_given_is_in_the_options_and_the_rest_has_its_default() -> None:
    assert bake("--taste", "lemon") == (Cake("lemon"), 1)
    given = bake(
        "--taste", "lemon", "--layers", "2", "--sugar", "0.5", "--method", "shared", "--no-warm", "--oven", "3"
    )
    assert given == (Cake("lemon", 2, 0.5, None, FusionMethod.SHARED, False), 3)


def test_names_are_one_text_with_commas() -> None:
    assert bake("--taste", "lemon", "--toppings", "cream, nuts")[0].toppings == ("cream", "nuts")
    assert bake("--taste", "lemon", "--toppings", "")[0].toppings is None


def test_a_value_beyond_its_limit_is_refused_by_the_options_name() -> None:
    with pytest.raises(BankError, match=r"^--layers must be at least 1, got 0$"):
        bake("--taste", "lemon", "--layers", "0")
    with pytest.raises(BankError, match=r"^--sugar must be between 0 and 1, got nan$"):
        bake("--taste", "lemon", "--sugar", "nan")
    with pytest.raises(BankError, match=r"^--batch-size must be at least 1, got -1$"):
        BuildOptions("chat", batch_size=-1)
    with pytest.raises(BankError, match=r"^--dtype must be one of auto, bfloat16, float32, got 'int8'$"):
        BuildOptions("chat", dtype="int8")
    with pytest.raises(BankError, match=r"^--k must be at least 1, got 0$"):
        ImportOptions(k=0)


def test_an_option_without_a_default_is_asked_for() -> None:
    result = CliRunner().invoke(app, ["bank", "build", "--users", "people", "--out", "bank"])
    assert result.exit_code == 2
    assert "--task" in result.output


@pytest.mark.parametrize(("command", "kind"), [("build", BuildOptions), ("import", ImportOptions)])
def test_the_help_shows_every_option_with_its_default(command: str, kind: type) -> None:
    output = CliRunner().invoke(app, ["bank", command, "--help"], env={"COLUMNS": "400"}).output
    shown = " ".join(output.replace("│", " ").split())
    options = options_of(kind)
    for field in dataclasses.fields(kind):
        option = options[field.name]
        assert f"--{field.name.replace('_', '-')} " in shown
        assert option.help in shown
        if option.shown_default:
            assert f"[default: ({option.shown_default})]" in shown
        elif isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"{option.help} [default: {field.default}]" in shown


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "topic, at most 2 anchors, strength 0.5"),
        (
            {"posterior": PosteriorRule(anchors=16)},
            "posterior, at most 16 anchors, decay 250; until there is a signature, topic",
        ),
        ({"signature": SignatureRule(slope=1.0)}, "signature, at most 16 anchors, strength 1, τ 2, κ 0; until"),
    ],
)
def test_the_rule_of_weights_is_told_in_a_line(rule: dict[str, Any], words: str) -> None:
    told = _rule(WeightRule(anchors=2, strength=0.5, **rule).model_dump(mode="json"))
    assert told.startswith(words)


def test_baselines_without_a_common_row_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text("not even JSON", "utf-8")
    options = ["--users", str(tmp_path / "users.json"), "--out", str(tmp_path / "bank"), "--task", "chat"]
    result = CliRunner().invoke(app, ["bank", "build", *options, "--baselines", "--no-common"])
    assert isinstance(result.exception, BankError)
    assert "drop --no-common" in str(result.exception)
