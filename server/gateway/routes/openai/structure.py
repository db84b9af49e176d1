"""What an answer must look like: formats, structures, and the tools that it may call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from server.gateway.routes.openai.schemas import check_schemas, check_size
from server.gateway.routes.requests import Strict


def _without_nulls(fields: Any) -> Any:
    return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


def check_encodable(value: Any) -> Any:
    try:
        orjson.dumps(value)
    except TypeError:
        raise PydanticCustomError("number", "must not contain integers beyond 64 bits") from None
    return value


def _check_format(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type") not in _FORMATS:
        raise PydanticCustomError("format", f"must have a type: {', '.join(_FORMATS)}")
    schema = value.get("json_schema")
    if value["type"] == "json_schema" and not (isinstance(schema, dict) and isinstance(schema.get("schema"), dict)):
        raise PydanticCustomError("format", "must have a json_schema with a name and a schema")
    check_size(check_encodable(value))
    check_schemas([schema])
    return value


def _check_kind(value: Any) -> Any:
    if isinstance(value, dict) and "grammar" in value:
        known = ", ".join(Structure.__annotations__)
        message = (
            f"must not be a grammar, because one of 220 bytes can take an engine over a minute: use one of {known}"
        )
        raise PydanticCustomError("structure", message)
    return value


def _check_structure(value: Structure) -> Structure:
    if len(value) != 1:
        raise PydanticCustomError("structure", f"must have one of {', '.join(Structure.__annotations__)}")
    check_size(check_encodable(value))
    check_schemas([value.get("json"), {"pattern": value.get("regex")}])
    return value


def _check_tools(tools: list[Tool]) -> list[Tool]:
    check_schemas(tool.function.parameters for tool in tools)
    return tools


def _check_tool_choice(value: Any) -> Any:
    if not isinstance(value, (str, dict)):
        raise PydanticCustomError("tool_choice", "must be a text or an object")
    return check_encodable(value)


_FORMATS = ("text", "json_object", "json_schema")
_FORMAT = {"type": "object", "properties": {"type": {"enum": list(_FORMATS)}}, "required": ["type"]}
_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}

NoNulls = BeforeValidator(_without_nulls)
NonEmpty = Annotated[str, Field(min_length=1)]
ResponseFormat = Annotated[dict[str, Any], AfterValidator(_check_format), WithJsonSchema(_FORMAT)]
ToolChoice = Annotated[Any, AfterValidator(_check_tool_choice), WithJsonSchema(_CHOICE)]


class Structure(TypedDict, total=False):
    """What an answer must look like: one of these. A vLLM extension."""

    __pydantic_config__ = ConfigDict(  # type: ignore[misc]
        strict=True, extra="forbid", json_schema_extra={"minProperties": 1, "maxProperties": 1}
    )

    json: dict[str, Any]
    regex: NonEmpty
    choice: Annotated[list[NonEmpty], Field(min_length=1, fail_fast=True)]
    json_object: Literal[True]


StructuredOutputs = Annotated[Structure, AfterValidator(_check_structure), BeforeValidator(_check_kind), NoNulls]


class Function(Strict):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(check_encodable)] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


Tools = Annotated[
    list[Annotated[Tool, NoNulls]],
    Field(fail_fast=True, min_length=1, max_length=128),
    AfterValidator(_check_tools),
]
