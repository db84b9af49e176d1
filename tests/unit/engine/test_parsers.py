"""What reads tool calls and reasoning, and the templates that stand in for models' own where those ignore tools."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from bank.errors import BankError
from bank.models.folders import template_hash
from server.engine.parsers import FAMILIES, TEMPLATES, check_parsers, tool_parser
from server.settings import Settings

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECES = ("", " ", "\n", "\n\n", "a", "<|im_end|>", "{{ x }}", "{%", "'", '"', "\\n", "ä", "🎉", "<tool_call>", "None")
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": {"where": "é"}}}


def rendered(template: str, conversations: list[list[dict[str, Any]]], **options: Any) -> list[str]:
    texts: list[str] = render_jinja_template(conversations, chat_template=template, **options)[0]
    return texts


@pytest.fixture(scope="module")
def ours() -> str:
    return TEMPLATES[template_hash(SMOLLM2)].read_text("utf-8")


def conversations(count: int) -> list[list[dict[str, Any]]]:
    draw = random.Random(7)
    roles = ("system", "user", "assistant", "tool", "developer")

    def message() -> dict[str, Any]:
        content = "".join(draw.choices(PIECES, k=draw.randint(0, 6)))
        return {"role": draw.choice(roles), "content": content} | draw.choice(({}, {"name": "x"}, {"tool_calls": []}))

    return [[message() for _ in range(draw.randint(1, 6))] for _ in range(count)]


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_ours_writes_what_the_models_own_does(ours: str, begun: bool, tools: Any) -> None:
    asked, options = conversations(1500), {"add_generation_prompt": begun, "tools": tools}
    assert rendered(ours, asked, **options) == rendered(SMOLLM2, asked, **options)


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_tools_calls_and_results_are_where_a_model_reads_them(ours: str, system: str | None) -> None:
    turns = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "here"},
        {"role": "assistant", "content": "Here.", "tool_calls": [CALL]},
    ]
    asked = turns if system is None else [{"role": "system", "content": system}, *turns]
    (text,) = rendered(ours, [asked], tools=[LOOK], add_generation_prompt=True)
    call = '<tool_call>\n{"name": "look", "arguments": {"where": "é"}}\n</tool_call>'
    first, _, rest = text.partition("<|im_end|>\n")
    opening = system or "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert first.startswith(f"<|im_start|>system\n{opening}\n\n") and json.dumps(LOOK["function"]) in first
    assert rest.endswith(
        f"<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
        f"<|im_start|>tool\nhere<|im_end|>\n<|im_start|>assistant\nHere.\n{call}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("mark", "parser"), FAMILIES.items())
@pytest.mark.parametrize("several", [False, True])
def test_a_family_is_known_by_its_template(mark: str, parser: str, several: bool) -> None:
    template: Any = f'{{{{- "\\n{mark}\\n" }}}}'
    template = [{"name": "tool_use", "template": template}] if several else template
    assert tool_parser(Settings(), template) == parser
    assert tool_parser(Settings(tool_parser="xlam"), template) == "xlam"
    assert tool_parser(Settings(tool_parser="none"), template) is None


def test_no_parser_is_guessed_for_an_unknown_family() -> None:
    assert [tool_parser(Settings(), template) for template in ("{{ messages }}", None)] == [None, None]
    assert tool_parser(Settings(), SMOLLM2) == "hermes"
    assert tool_parser(Settings(), SMOLLM2 + " ") is None


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    ("setting", "name", "close"), [("tool_parser", "hermess", "hermes"), ("reasoning_parser", "qwen", "qwen3")]
)
def test_an_unknown_parser_is_refused_with_what_is_close(setting: str, name: str, close: str) -> None:
    with pytest.raises(BankError, match=rf"MTA_{setting.upper()}: .* '{name}'\. Close to it are {close}, "):
        check_parsers(Settings(**{setting: name}))  # type: ignore[arg-type]
    check_parsers(Settings(tool_parser="none", reasoning_parser=None))
    check_parsers(Settings(**{setting: close}))  # type: ignore[arg-type]
