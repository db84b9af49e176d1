"""How an engine reads tool calls and reasoning: vLLM's parsers, and templates for models whose own ignore tools."""

from __future__ import annotations

import ast
import importlib.util
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bank.errors import BankError
from bank.models.folders import chat_template, template_hash
from server.settings import Settings

FAMILIES = {  # what only such a family's chat template says, and the parser that reads what it asks for
    "<args-json-object>": "hermes",  # Qwen2.5, Qwen3, SmolLM3
    "<parameter=example_parameter_1>": "qwen3_coder",  # Qwen3-Coder, Qwen3.5
    "[TOOL_CALLS]": "mistral",
    "Environment: ipython": "llama3_json",  # Llama 3.1 to 3.3
}
TEMPLATES = {  # hash of a model's own template → ours, which is the same to the letter without tools
    "dc126cf0155881b6f71b8e9a239956ae0ba45f68df08b016dadddf4c61120217": Path(__file__).parent
    / "templates/smollm2.jinja"
}


def parser_options(settings: Settings, model_folder: Path) -> dict[str, object]:
    """Return vLLM's options by name, as `command.py` has them."""
    template = chat_template(model_folder)
    parser = tool_parser(settings, template)
    return {
        "tool-call-parser": parser,
        "enable-auto-tool-choice": [] if parser else None,
        "tool-strict-level": "parameter" if parser else None,  # all arguments follow their schema, not `strict` ones
        "chat-template": TEMPLATES.get(template_hash(template)) if parser else None,
        "reasoning-parser": settings.reasoning_parser,
    }


def tool_parser(settings: Settings, template: Any) -> str | None:
    """Return the name of vLLM's parser: as it is set, or that of the family that a model's chat template shows."""
    if settings.tool_parser is not None:
        return None if settings.tool_parser == "none" else settings.tool_parser
    ours = TEMPLATES.get(template_hash(template))
    says = ours.read_text("utf-8") if ours else str(template)
    return next((parser for mark, parser in FAMILIES.items() if mark in says), None)


def check_parsers(settings: Settings) -> None:
    """Raise BankError if vLLM has no parser of the name that is set."""
    for what, package in (("tool", "tool_parsers"), ("reasoning", "reasoning")):
        known, name = registered(package), getattr(settings, f"{what}_parser")
        if name is not None and name not in known and (what, name) != ("tool", "none"):
            close = ", ".join(get_close_matches(name, sorted(known), 3, cutoff=0))
            raise BankError(
                f"MTA_{what.upper()}_PARSER: vLLM has no {what} parser {name!r}. Close to it are {close}; it has "
                f"{', '.join(sorted(known))}"
            )


def registered(package: str) -> set[str]:
    """Return the names that vLLM registers in its package, as its source says: an import takes many seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return set()
    source = (Path(spec.origin).parent / package / "__init__.py").read_text("utf-8")
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    [table] = [node.value for node in assigned if ast.unparse(node.targets[0]).endswith("_TO_REGISTER")]
    return set(ast.literal_eval(table))
