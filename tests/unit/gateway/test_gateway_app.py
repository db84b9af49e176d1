"""What the gateway loads, and that the examples in its API's document are whole and valid."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict, TypeAdapter

from server.gateway.app import create_app
from server.gateway.routes.answering import PersonalizationAnswer, Usage
from server.gateway.routes.generate import GenerateAnswer
from server.gateway.routes.jobs import AdaptRequest, JobAnswer
from server.gateway.routes.openai.requests import (
    IGNORED,
    MAX_ARGUMENT_CHARS,
    MAX_ECHOED,
    MAX_STOP_IDS,
    OWN_FIELDS,
    REFUSED,
    ChatRequest,
    CompletionRequest,
)
from server.gateway.routes.openai.schemas import MAX_BYTES, MAX_COUNTED, MAX_REPEATS, MAX_STATES
from server.gateway.routes.openai.structure import Structure
from server.gateway.routes.requests import GenerateRequest
from server.gateway.routes.users import ItemsRequest
from server.settings import Settings
from tests.support.documented import ROOT

HEAVY = {"torch", "vllm", "transformers", "peft", "sklearn", "scipy", "triton"}

LOAD = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))  # where a module is None, importing it fails
from server.gateway.app import create_app
from server.settings import Settings
import server.cli.run.gateway
create_app(Settings()).openapi()
import faiss, onnxruntime, tokenizers, uvicorn, uvloop  # what it loads once it serves
print(json.dumps(sorted({name.partition(".")[0] for name, module in sys.modules.items() if module})))
"""


def test_gateway_starts_on_own_requirements_and_loads_none_heavy() -> None:
    image = _closure("mta-server")
    found = packages_distributions()
    outside = {module for module, origins in found.items() if image.isdisjoint(map(canonicalize_name, origins))}
    assert {"torch", "vllm", "transformers"} <= outside
    for missing in (outside, set()):  # without them, and where nobody would notice
        command = [sys.executable, "-c", LOAD, json.dumps(sorted(missing))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        loaded = set(json.loads(done.stdout))
        assert "fastapi" in loaded
        assert not loaded & HEAVY


def _closure(root: str) -> set[str]:
    """A distribution and all that it requires, with the extras that requirements name."""
    found: set[str] = set()
    queue = [(root, frozenset[str]())]
    while queue:
        name, extras = queue.pop()
        found.add(name)
        try:
            requirements = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        for requirement in requirements:
            environments = [{"extra": extra} for extra in (extras or {""})]
            applies = requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments)
            child = canonicalize_name(requirement.name)
            if applies and (child not in found or requirement.extras):
                queue.append((child, frozenset(requirement.extras)))
    return found


DOCUMENT = create_app(Settings()).openapi()


def test_the_committed_description_of_the_api_is_current() -> None:
    committed = json.loads((ROOT / "docs/openapi.json").read_text("utf-8"))
    assert committed == json.loads(json.dumps(DOCUMENT)), "make openapi writes it"


class Chunk(ChatCompletionChunk):
    model_config = ConfigDict(extra="forbid")
    personalization: PersonalizationAnswer | None = None
    usage: Usage | None = None  # type: ignore[assignment]
    moved: int | None = None
    timings_ms: dict[str, float] | None = None


def check_whole(shape: Any, text: str) -> None:
    """Fail unless a value has the fields of its shape, all of them and no other."""
    adapter = TypeAdapter(shape)
    dumped = adapter.dump_python(adapter.validate_json(text), mode="json", exclude_unset=shape is Chunk)
    assert dumped == json.loads(text)


def shown(path: str, method: str, media_type: str) -> Any:
    return DOCUMENT["paths"][path][method]["responses"]["200"]["content"][media_type]["example"]


def test_the_document_shows_whole_answers_and_events() -> None:
    check_whole(GenerateAnswer, json.dumps(shown("/generate", "post", "application/json")))
    for path, method, shape in (("/generate", "post", Chunk), ("/jobs/{job_id}/events", "get", JobAnswer)):
        values = re.findall(r"^data: (\{.+)$", shown(path, method, "text/event-stream"), re.MULTILINE)
        assert values
        for value in values:
            check_whole(shape, value)
    followed = DOCUMENT["paths"]["/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]
    assert followed.keys() == {"text/event-stream"}


@pytest.mark.parametrize("model", [GenerateRequest, ChatRequest, CompletionRequest])
def test_the_document_lets_stop_be_one_text(model: type[BaseModel]) -> None:
    stop = DOCUMENT["components"]["schemas"][model.__name__]["properties"]["stop"]
    assert {shape["type"] for shape in stop["anyOf"]} == {"string", "array", "null"}


@pytest.mark.parametrize("model", [GenerateRequest, ItemsRequest, AdaptRequest])
def test_the_document_shows_requests_that_are_taken(model: type[BaseModel]) -> None:
    examples = DOCUMENT["components"]["schemas"][model.__name__]["examples"]
    assert examples
    for example in examples:
        model.model_validate_json(json.dumps(example))


def test_the_table_of_openais_fields_is_the_gateways() -> None:
    text, _, _ = (ROOT / "docs/openai.md").read_text(encoding="utf-8").partition("| field | default |")
    rows = [set(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| (`\w+`.*?) \|", text, re.MULTILINE)]
    (ours, personal), bounded, (ignored, refused) = rows[:2], rows[2:-2], rows[-2:]
    passed_on = (ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()) - OWN_FIELDS
    assert (ours | personal, set().union(*bounded), ignored, refused) == (OWN_FIELDS, passed_on, IGNORED, REFUSED)
    assert sum(map(len, bounded)) == len(passed_on)


def test_the_table_of_openais_fields_has_their_bounds() -> None:
    table, _, _ = (ROOT / "docs/openai.md").read_text(encoding="utf-8").partition("Any other field is a 400")
    for bound in (
        f"one of them, of at most {MAX_BYTES >> 10} KiB as JSON",
        f"at most {MAX_STATES:,} places in all",
        f"repeat nothing more than {MAX_REPEATS} times",
        f"at most {MAX_COUNTED} properties",
        f"lists their names (`{Settings.model_fields['chat_template_kwargs'].default}` by default)",
        f"texts of at most {MAX_ARGUMENT_CHARS} characters",
        f"at most {MAX_STOP_IDS} of the model's vocabulary",
        f"at most {MAX_ECHOED} token ids or bytes",
    ):
        assert bound in table
    (kinds,) = re.findall(r"has one of (.+?);", table)
    assert set(re.findall(r"`(\w+)`", kinds)) == Structure.__annotations__.keys()
