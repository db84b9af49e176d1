"""The only module that turns a conversation into token ids, so that training uses the same tokens as vLLM's serving."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import takewhile
from typing import Any

from adapters.training.example import Example

_ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for an answer: its own text can occur in the template
_TURNS = "a", "1", "\n\n", " ."  # a turn's first characters can share a token with what is before it


def chat_messages(turn: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn}]


def encode_pair(tokenizer: Any, turn: str, output: str, max_tokens: int) -> Example:
    """Tokenise one (turn, output) pair as in serving, which tokenises the prompt alone.

    If the pair exceeds `max_tokens`, the end of the user's turn is cut, never the chat template around it; the output
    is cut only if it alone is too long.
    """
    whole = encode_conversation(tokenizer, chat_messages(turn), output)
    before, after = list(whole.ids[: whole.loss_from]), list(whole.ids[whole.loss_from :])
    overflow = len(whole.ids) - max_tokens
    if overflow > 0:
        turn_ids = tokenizer.encode(turn, add_special_tokens=False)
        kept = max(0, len(turn_ids) - overflow)
        before = prompt_ids(tokenizer, chat_messages(tokenizer.decode(turn_ids[:kept])))
        while kept and len(before) + len(after) > max_tokens:  # a cut inside a character can add ids
            kept -= 1
            before = prompt_ids(tokenizer, chat_messages(tokenizer.decode(turn_ids[:kept])))
    return replace(whole, ids=tuple((before + after)[:max_tokens]), loss_from=min(len(before), max_tokens))


def encode_conversation(tokenizer: Any, messages: list[dict[str, str]], output: str) -> Example:
    """Tokenise a conversation that ends with the user's turn, and the expected answer, without cutting anything."""
    before = prompt_ids(tokenizer, messages)
    after = tokenizer.encode(output + _end_of_turn(tokenizer, messages), add_special_tokens=False)
    return Example(tuple(before + after), len(before), system=system_tokens(tokenizer, messages, before))


def system_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]], ids: Sequence[int]) -> int:
    """Return the number of a prompt's first tokens that all conversations with the same system prompt have."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(opening(tokenizer, messages), ids, strict=False))
    return sum(1 for _ in same)


def opening(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Return the tokens that all prompts with the same messages before the user's first turn begin with.

    `options` are the chat template's, such as tools.
    """
    system = [dict(message) for message in takewhile(lambda message: message["role"] != "user", messages)]
    return _opening(tokenizer, json.dumps(system), json.dumps(options))


@lru_cache(1024)
def _opening(tokenizer: Any, system: str, options: str) -> list[int]:
    messages, given = json.loads(system), json.loads(options)
    prompts = [prompt_ids(tokenizer, [*messages, *chat_messages(turn)], **given) for turn in _TURNS]
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))]


def answer_ids(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Tokenise answers with the end of turn, as they stand in examples."""
    end = _end_of_turn(tokenizer, chat_messages("?"))
    return [tokenizer.encode(answer + end, add_special_tokens=False) for answer in answers]


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    return ids


def _end_of_turn(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return what the template writes after an answer, without white space, which is not generated."""
    answered = [*messages, {"role": "assistant", "content": _ANSWER}]
    whole: str = tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False)
    _, answer, after = whole.rpartition(_ANSWER)
    return (after.strip() if answer else "") or str(tokenizer.eos_token or "")
