"""Request bodies of OpenAI's API, and what those of other formats become. Strict; null means that a field is not set.

Fields that are neither defined nor ignored are refused. Fields outside `OWN_FIELDS` go to the engine unchanged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Set
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters.errors import excerpt
from server.errors import InvalidRequest
from server.gateway.generation.request import CONTINUATION_TOKENS, prompts_of, size_bytes
from server.gateway.http.errors import fault_of
from server.gateway.routes.openai.structure import (
    NoNulls,
    ResponseFormat,
    StructuredOutputs,
    ToolChoice,
    Tools,
    check_encodable,
)
from server.gateway.routes.requests import MAX_MESSAGES, AnswerRequest, History, PersonalRequest, Strict, UserId
from server.settings import MAX_INT32

PERSONAL_MODEL = "mta"
STRING = {"type": "string"}
OWN_FIELDS = {
    *("model", "user", "messages", "prompt", "stream", "stream_options"),
    *("history", "personalize", "strength", "words", "learn", "rewrite"),
}
IGNORED = {  # hints, which change no answer of this server
    *("store", "metadata", "service_tier", "reasoning_effort", "verbosity"),
    *("prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
}
REFUSED = frozenset(  # fields that control the engine
    ("cache_salt", "priority", "request_id", "session_id", "kv_transfer_params", "vllm_xargs", "chat_template")
)
MAX_ECHOED = 512  # tokens of a prompt with logprobs: their logits are outside of the engines' memory plan
MAX_CHOICES = 128  # maximum number of answers to one request: prompts times `n`
MAX_STOP_IDS = 64  # on GPUs vLLM has room for 128, with the model's own
MAX_ARGUMENT_CHARS = 256  # of a chat template


def object_schema(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the JSON schema of an object with these fields, whose other fields are ignored."""
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def texts_schema(*kinds: str) -> dict[str, Any]:
    """Return the JSON schema of what `text_of` takes."""
    part = object_schema({"type": {"enum": list(kinds)}, "text": STRING})
    return {"anyOf": [STRING, {"type": "array", "items": part}]}


def text_of(content: Any, *kinds: str) -> str:
    """Return a text, or the texts of a list of parts of these types, joined as vLLM does it."""
    if isinstance(content, str):
        return content
    for part in content if isinstance(content, list) else [content]:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (part, None)
        if kind not in kinds or not isinstance(text, str):
            told = {"kinds": " or ".join(kinds), "kind": excerpt(kind)}
            raise PydanticCustomError("parts", "must be a text or parts of type {kinds} with a text, not {kind}", told)
    return "\n".join(part["text"] for part in content)


def _check_prompt(value: Any) -> Any:
    prompts = value if isinstance(value, list) else [value]
    are_texts = all(isinstance(prompt, str) and prompt for prompt in prompts)
    are_token_ids = _is_token_ids(value) or all(map(_is_token_ids, prompts))
    if not prompts or not (are_texts or are_token_ids):
        raise PydanticCustomError("prompt", "must be a non-empty text, token ids, or a list of either")
    return value


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(id_) is int and 0 <= id_ <= MAX_INT32 for id_ in value)


def _check_arguments(value: dict[str, Any]) -> dict[str, Any]:
    for argument in value.values():
        if not isinstance(argument, bool | int | float | str) or len(str(argument)) > MAX_ARGUMENT_CHARS:
            kinds = f"booleans, numbers and texts of at most {MAX_ARGUMENT_CHARS} characters"
            raise PydanticCustomError("arguments", f"must have only {kinds} as values")
    check_encodable(value)
    return value


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_INT32}}
_PROMPTS = {"anyOf": [_TEXT, _IDS, *({"type": "array", "minItems": 1, "items": item} for item in (_TEXT, _IDS))]}
_ARGUMENT = {"anyOf": [{"type": ["boolean", "number"]}, STRING | {"maxLength": MAX_ARGUMENT_CHARS}]}
_ARGUMENTS = {"type": "object", "additionalProperties": _ARGUMENT}

Text = Annotated[str, BeforeValidator(lambda content: text_of(content, "text")), WithJsonSchema(texts_schema("text"))]
TemplateArguments = Annotated[dict[str, Any], AfterValidator(_check_arguments), NoNulls, WithJsonSchema(_ARGUMENTS)]
ChatHistory = Annotated[
    History | None, Field(description="As in `/generate`. Default: `auto` if the API key says so, else 0.")
]


class CalledFunction(Strict):
    name: str = Field(min_length=1)
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = Field(
        None, description="A text, or parts of type `text`; optional for an assistant message with `tool_calls`."
    )
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tool_call_id: str | None = None
    reasoning: str | None = Field(None, description="Reasoning of an earlier answer; a vLLM extension.")

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("content", "must have content")
        return self


class StreamOptions(Strict):
    include_usage: bool = Field(False, description="Send a last chunk with the usage and without choices.")
    continuous_usage_stats: bool = Field(False, description="Send the usage so far in every chunk; a vLLM extension.")
    include_obfuscation: bool = Field(False, description="No effect: chunks are not padded.")


class ModelRequest(PersonalRequest):
    """What requests in formats of other servers share."""

    ID_PREFIX: ClassVar[str]  # of answers
    PROMPT: ClassVar[str]  # name of the field with the prompt
    LONGEST: ClassVar[str] = "max_tokens"  # and of that with the maximum length of an answer
    HINTS: ClassVar[Set[str]] = IGNORED

    model: str = Field(PERSONAL_MODEL, description="`mta`, or `base` for the base model.")
    user: UserId | None = Field(None, description="User id; alternative to the header X-User-ID.")
    _ignored: tuple[str, ...] = ()

    @classmethod
    def check(cls, fields: Mapping[str, Any]) -> None:
        """Raise InvalidRequest if fields that would not be read must not be dropped either."""
        if refused := next((name for name in fields if name in REFUSED), None):
            message = f"{refused} controls the engine, which only the server may do: leave it out"
            raise InvalidRequest(message, param=refused, code="refused_field")

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_or_drop_fields(cls, fields: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Drop ignored fields and nulls."""
        if not isinstance(fields, dict):
            return validate(fields)
        cls.check(fields)
        made = validate({n: value for n, value in fields.items() if n not in cls.HINTS and value is not None})
        made._ignored = tuple(name for name, value in fields.items() if name in cls.HINTS and value is not None)
        return made

    @property
    def ignored(self) -> tuple[str, ...]:
        return self._ignored


class OpenAIRequest(ModelRequest, AnswerRequest):
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_INT32)]] | None = Field(
        None, fail_fast=True, max_length=MAX_STOP_IDS, description="Tokens that end the answer; a vLLM extension."
    )
    stream_options: StreamOptions | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT32, description="Requires `max_tokens`; a vLLM extension.")
    ignore_eos: bool | None = Field(None, description="Whether to write on after an answer's end; a vLLM extension.")
    skip_special_tokens: bool | None = Field(None, description="Of the answer's text; a vLLM extension.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options and not self.stream:
            message = "stream_options requires a stream: set stream to true, or leave stream_options out"
            raise PydanticCustomError("combination", message, {"param": "stream_options"})
        return self

    @model_validator(mode="after")
    def _check_formats(self) -> Self:
        if self.structured_outputs and self.response_format:
            message = "structured_outputs does not go with response_format: leave one of them out"
            raise PydanticCustomError("combination", message, {"param": "structured_outputs"})
        return self

    @model_validator(mode="after")
    def _check_min_tokens(self) -> Self:
        if self.min_tokens and self.min_tokens > (self.longest or 0):
            message = f"min_tokens requires a max_tokens of at least as many: {self.min_tokens}, got {self.longest}"
            raise PydanticCustomError("combination", message, {"param": "min_tokens"})
        return self

    @property
    def longest(self) -> int | None:
        """The requested maximum length of an answer in tokens."""
        return self.max_tokens

    @property
    def engine_fields(self) -> dict[str, Any]:
        return self.model_dump(exclude=OWN_FIELDS, exclude_unset=True)


class ChatRequest(OpenAIRequest):
    ID_PREFIX = "chatcmpl"
    PROMPT = "messages"

    messages: list[Annotated[ChatMessage, NoNulls]] = Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="Overrides `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateArguments | None = Field(
        None, description="Arguments of the chat template, of those in `MTA_CHAT_TEMPLATE_KWARGS`; a vLLM extension."
    )
    history: ChatHistory = None
    rewrite: bool = Field(
        False, description="Whether the last message is a draft, to be given back in the user's own words (`/rewrite`)."
    )

    @model_validator(mode="after")
    def _check_draft(self) -> Self:
        last = self.messages[-1]
        if self.rewrite and (last.role != "user" or not (last.content or "").strip()):
            message = f"rewrite requires a draft: the last message, of the user and not empty; it is {last.role}'s"
            raise PydanticCustomError("combination", message, {"param": "messages"})
        if self.rewrite and self.learn:
            raise PydanticCustomError("combination", "a draft is never learnt: leave learn out", {"param": "learn"})
        return self

    @property
    def draft(self) -> str | None:
        return self.messages[-1].content if self.rewrite else None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(OpenAIRequest):
    """A continuation of a prompt, verbatim and without a chat template."""

    ID_PREFIX = "cmpl"
    PROMPT = "prompt"

    prompt: Annotated[str | list[Any], PlainValidator(_check_prompt), WithJsonSchema(_PROMPTS)]
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_INT32, description=f"{CONTINUATION_TOKENS} by default; 0 only with `echo`."
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if len(prompts_of(self.prompt)) * (self.n or 1) > MAX_CHOICES:
            message = f"the number of prompts times n must be at most {MAX_CHOICES}"
            raise PydanticCustomError("combination", message, {"param": "prompt"})
        longest = max(size_bytes(each) if isinstance(each, str) else len(each) for each in prompts_of(self.prompt))
        if self.echo and self.logprobs is not None and longest > MAX_ECHOED:
            message = f"echo with logprobs takes prompts of at most {MAX_ECHOED} bytes or token ids, not {longest}"
            raise PydanticCustomError("combination", message, {"param": "echo"})
        return self


class TranslatedRequest(ModelRequest):
    """A request in another format, with the chat request that it becomes; errors name the fields of this one."""

    RENAMED: ClassVar[Mapping[str, str]]  # parts of the names of the chat request's fields

    history: ChatHistory = None
    _chat: ChatRequest

    @abstractmethod
    def chat_fields(self) -> dict[str, Any]:
        """Return the chat request's fields that have another name or form here; None for one that is not set."""

    @model_validator(mode="after")
    def _translate(self) -> Self:
        shared = self.model_dump(include=set(TranslatedRequest.model_fields), exclude_unset=True)
        try:
            self._chat = ChatRequest.model_validate(shared | self.chat_fields())
        except ValidationError as error:
            fault = fault_of(error.errors())
            for name, renamed in self.RENAMED.items():
                fault.message = fault.message.replace(name, renamed, 1)
                fault.param = fault.param and fault.param.replace(name, renamed, 1)
            raise fault from None
        return self

    @property
    def chat(self) -> ChatRequest:
        return self._chat
