"""OpenAI's Responses and Anthropic's Messages over a real engine, with the Python clients of both, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.support.gateway import GatewayThread

ASKED: dict[str, Any] = {"model": "mta", "extra_body": {"temperature": 0}}
HELLO = [{"role": "user", "content": "hello there"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def gpt(gateway_over_vllm: GatewayThread) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway_over_vllm.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def claude(gateway_over_vllm: GatewayThread) -> Iterator[Anthropic]:
    with Anthropic(base_url=gateway_over_vllm.url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def chat(gpt: OpenAI, messages: Any = HELLO, **fields: Any) -> str:
    """What the chat route answers."""
    answer = gpt.chat.completions.create(messages=messages, max_tokens=24, **ASKED | fields)
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize("user", ["rosa", "nobody"])
def test_both_say_what_chat_says(gpt: OpenAI, claude: Anthropic, user: str) -> None:
    wanted = chat(gpt, [{"role": "system", "content": "be kind"}, *HELLO], user=user)
    one = gpt.responses.create(input="hello there", instructions="be kind", max_output_tokens=24, user=user, **ASKED)
    other = claude.messages.create(system="be kind", messages=HELLO, max_tokens=24, metadata={"user_id": user}, **ASKED)
    assert one.output_text == other.content[0].text == wanted
    level = "merged" if user == "rosa" else "base"
    assert one.personalization["level"] == other.personalization["level"] == level
    assert (one.usage.output_tokens, one.usage.input_tokens) == (other.usage.output_tokens, other.usage.input_tokens)


@pytest.mark.parametrize("length", [4, 200])
def test_a_streamed_response_is_the_whole_one(gpt: OpenAI, length: int) -> None:
    asked = ASKED | {"input": HELLO, "max_output_tokens": length, "user": "rosa"}
    whole = gpt.responses.create(**asked)
    with gpt.responses.stream(**asked) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    ends = ["output_text.done", "content_part.done", "output_item.done", whole.status]
    begins = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"]
    assert kinds == [f"response.{name}" for name in begins + ends]
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == whole.output_text
    assert (last.usage, last.personalization["recipe"]) == (whole.usage, whole.personalization["recipe"])
    assert whole.status == ("incomplete" if length == 4 else "completed")


def test_a_streamed_message_is_the_whole_one(claude: Anthropic) -> None:
    asked = ASKED | {"messages": HELLO, "max_tokens": 4, "metadata": {"user_id": "rosa"}}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == last.content[0].text == whole.content[0].text
    assert (last.usage, last.stop_reason) == (whole.usage, "max_tokens")
    assert last.personalization["recipe"] == whole.personalization["recipe"]


def test_a_format_is_written_in(gpt: OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    answer = gpt.responses.create(input="a place?", text=form, user="rosa", max_output_tokens=8, **ASKED)
    assert answer.output_text.startswith("{")


def test_a_stop_sequence_is_named(gpt: OpenAI, claude: Anthropic) -> None:
    stop = chat(gpt)[3:5]
    answer = claude.messages.create(messages=HELLO, max_tokens=24, stop_sequences=[stop], **ASKED)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


def test_errors_are_the_clients_own(gpt: OpenAI, claude: Anthropic) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        gpt.responses.retrieve("resp-1")
    assert missing.value.code == "stored"
    with pytest.raises(openai.BadRequestError) as refused:
        gpt.responses.create(input="x", previous_response_id="resp-1", model="mta")
    assert (refused.value.code, refused.value.param) == ("stored", "previous_response_id")
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(model="other", max_tokens=4, messages=HELLO)
    assert (unknown.value.type, unknown.value.error_code) == ("not_found_error", "model_not_found")
