"""vLLM servers for comparison: the product's engine, vLLM with its own LoRA path, and vLLM without LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from bench.rig.engine import KEY, Engine, served
from bench.rig.subject import Subject
from server.engine.command import engine_command
from server.settings import Settings
from server.supervisor.services import free_port

Flavour = Literal["ours", "stock", "plain"]
"""`ours` is the product's engine; `stock` has no plugin and loads adapters at run time with vLLM's own LoRA; `plain`
has no LoRA, and vLLM may compile it."""

_LORA = ("--max-loras", "--max-cpu-loras", "--max-lora-rank")


@contextmanager
def vllm_server(
    subject: Subject, flavour: Flavour = "ours", *, arguments: Sequence[str] = (), **settings: object
) -> Iterator[Engine]:
    """Run a vLLM of a flavour; all other options are the same for each flavour."""
    port = free_port()
    argv, environment = vllm_command(subject, flavour, port, **settings)
    with served([*argv, *arguments], environment, port) as engine:
        yield engine


def vllm_command(subject: Subject, flavour: Flavour, port: int, **settings: object) -> tuple[list[str], dict[str, str]]:
    """Return argv and environment of a server of a flavour on a port."""
    chosen: dict[str, object] = {"bank": subject.bank, "engine_port": port, "engine_key": KEY, "max_num_seqs": 16}
    argv, environment = engine_command(
        Settings(**chosen | settings),  # type: ignore[arg-type]
        [subject.manifest],
        subject.model,
    )
    if flavour == "ours":
        return argv, environment
    argv = _without(argv, "--worker-extension-cls", "--scheduler-cls")
    environment |= {"VLLM_PLUGINS": "", "MTA_BANK": ""}
    if flavour == "stock":
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        return argv, environment
    environment.pop("TORCHDYNAMO_DISABLE", None)  # allow compilation
    argv = _without(argv, *_LORA)
    modules = argv.index("--lora-target-modules") + 1
    while modules < len(argv) and not argv[modules].startswith("--"):
        del argv[modules]
    flags = {"--enable-lora", "--lora-target-modules", "--enforce-eager"}
    return [argument for argument in argv if argument not in flags], environment


def _without(argv: Sequence[str], *options: str) -> list[str]:
    """Return the command without some options and their values."""
    kept = list(argv)
    for option in options:
        if option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return kept
