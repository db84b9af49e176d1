"""Command-line options from the fields of a dataclass: each is declared once, with its default, help and limits."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_type_hints

import typer

from bank.building.options import options_of

_OPTIONS = "options"
_NAMES = tuple[str, ...] | None
"""A field of several names; comma-separated on the command line."""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command out of a function that takes a dataclass as `options`.

    Args:
        command: what Typer could make a command of, except for its parameter `options`, whose type is a dataclass
            that `bank.building.options.options_of` can read.

    Returns:
        The same with an option for each field in place of `options`; required ones come first.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    kind = parameters[_OPTIONS].annotation
    types = get_type_hints(kind)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {name: given.pop(name) for name in types}
        for name, value in values.items():
            if types[name] == _NAMES:
                values[name] = tuple(part.strip() for part in value.split(",")) if value else None
        command(options=kind(**values), **given)

    spread = [new for old in parameters.values() for new in (_of_fields(kind) if old.name == _OPTIONS else [old])]
    spread.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in spread]
    )
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return run


def _of_fields(kind: type) -> Iterator[inspect.Parameter]:
    options, types = options_of(kind), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        option = options[field.name]
        shown = True if option.shown_default is None else option.shown_default
        plain = str | None if types[field.name] == _NAMES else types[field.name]
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=Annotated[plain, typer.Option(help=option.help, show_default=shown)],
        )
