"""The options of `mta bank`: their defaults, their limits, and what help says of them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from bank.building.options import BuildOptions, ImportOptions
from bank.errors import BankError
from bank.manifest import PosteriorRule, WeightRule
from server.cli import app
from server.cli.bank import commands


@pytest.mark.parametrize(("kind", "command"), [(BuildOptions, commands.build), (ImportOptions, commands.import_)])
def test_a_command_gives_what_is_typed_and_the_options_own_defaults(kind: type, command: Callable[..., None]) -> None:
    defaults = kind("chat")
    for name, parameter in inspect.signature(command).parameters.items():
        if name in kind.__dataclass_fields__ and parameter.default is not parameter.empty:
            assert parameter.default == getattr(defaults, name)
    given = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(kind)}
    assert commands._options(kind, given | {"k": 3, "out": "bank"}) == kind("chat", k=3)


@pytest.mark.parametrize(
    ("given", "names"), [("q_proj, v_proj", ("q_proj", "v_proj")), (("q_proj",), ("q_proj",)), ("", None)]
)
def test_names_are_one_text_with_commas(given: Any, names: tuple[str, ...] | None) -> None:
    assert BuildOptions("chat", target_modules=given).target_modules == names


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (BuildOptions, {"batch_size": -1}, "--batch-size: .* greater than or equal to 1, got -1"),
        (BuildOptions, {"learning_rate": math.nan}, "--learning-rate: .* got nan"),
        (BuildOptions, {"learning_rate": 1.0}, "--learning-rate: .* less than 1, got 1.0"),
        (BuildOptions, {"history_share": 1.1}, "--history-share: .* less than or equal to 1, got 1.1"),
        (BuildOptions, {"dtype": "int8"}, "--dtype: .*'auto', 'bfloat16' or 'float32', got 'int8'"),
        (BuildOptions, {"anchors_by": "luck"}, "--anchors-by: .* got 'luck'"),
        (ImportOptions, {"k": 0}, "--k: .* greater than or equal to 1, got 0"),
    ],
)
def test_a_value_beyond_its_limit_is_refused_by_the_options_name(kind: type, given: dict[str, Any], says: str) -> None:
    with pytest.raises(BankError, match=f"^{says}$"):
        kind(**{"task": "chat"} | given)


def test_an_option_without_a_default_is_asked_for() -> None:
    result = CliRunner().invoke(app, ["bank", "build", "--users", "people", "--out", "bank"])
    assert result.exit_code == 2
    assert "--task" in result.output


@pytest.mark.parametrize(("command", "kind"), [("build", BuildOptions), ("import", ImportOptions)])
def test_the_help_shows_every_option_with_its_default(command: str, kind: type) -> None:
    output = CliRunner().invoke(app, ["bank", command, "--help"], env={"COLUMNS": "400"}).output
    shown = " ".join(output.replace("│", " ").split())
    for field in dataclasses.fields(kind):
        about = shown.partition(f"--{field.name.replace('_', '-')} ")[2].partition("]")[0] + "]"
        assert about
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in about


def test_the_rule_of_weights_is_told_in_a_line() -> None:
    topic = "topic, at most 2 anchors, strength 0.5"
    posterior = f"posterior, at most 16 anchors, decay 250; until there is a signature, {topic}"
    for rule, words in ((None, topic), (PosteriorRule(anchors=16), posterior)):
        weights = WeightRule(anchors=2, strength=0.5, posterior=rule)
        assert commands._describe_rule(weights.model_dump(mode="json")) == words
