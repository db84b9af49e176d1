"""What a base model needs: the bytes of its weights and KV cache, and of each slot, row and user adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from adapters.lora import ModuleShape, RowLayout, serving_rank
from adapters.training.forward.shared_part import MAX_KEPT_BYTES
from bank.building.options import BuildOptions
from bank.errors import BankError
from bank.manifest import BankManifest
from bank.models.folders import DEFAULT_MODEL, ensure_base_model, model_config, weight_bytes
from server.engine.command import slot_bytes
from server.settings import Settings

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
BF16 = 2  # bytes of a number in a bank and in a user adapter
CUDA_BYTES = GIB  # estimate for CUDA and its libraries, per process
FORWARD_BYTES = 2 * GIB  # estimate for an engine's activations and graphs
MIN_TRAINING_BYTES = 2 * GIB  # minimum for a job besides the base model; a large model needs a quarter of its size
KEPT_BYTES = 3  # that training keeps of each number that goes into or comes out of a trained module; Llama's: 2.3
NUMBER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ROWS = 64  # a bank's anchors, or its directions if it has more people
CONTEXT, SLOTS, USER_RANK, CARDS = 8192, 32, 2, (2, 4, 8)  # of the printed table
CUT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # tensor parallelism cuts H_out, and so B
CUT_INPUTS = ("o_proj", "down_proj")  # H_in, and so A


def token_bytes(config: Mapping[str, Any], number: int) -> int:
    """Return the size of one token in the KV cache of a model, whose numbers have `number` bytes."""
    config = _language(config)
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or config.get("hidden_size", 0) // heads
    layers = config.get("num_hidden_layers", 0)
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * width * number)


class Required(NamedTuple):
    """GPU memory of an engine and of a worker, in bytes; of the worker's, that of a job, and of a token in a sample."""

    engine: int
    worker: int
    job: int
    token: int


def needs_of(model_folder: Path, manifests: Sequence[BankManifest], settings: Settings) -> Required:
    """Estimate the GPU memory; rather too much than too little."""
    config, stored = model_config(model_folder), weight_bytes(model_folder)
    number = NUMBER_BYTES.get(settings.dtype, BF16)
    if bits := bits_of(config):  # vLLM keeps weights quantised, training does not
        weights, served = stored * 8 // bits, stored
    else:
        weights = stored // NUMBER_BYTES.get(config.get("dtype") or config.get("torch_dtype") or "", BF16)
        served = weights * number
    context = settings.max_model_len or _language(config).get("max_position_embeddings", 0)
    sharing = sum(manifest.shares_prompts for manifest in manifests)  # banks whose common row has a slot of its own
    slots = ((settings.max_loras or settings.max_num_seqs) + sharing) * slot_bytes(manifests, number)
    rows = sum(rows_bytes(manifest.layout, manifest.personal_rows + manifest.common) for manifest in manifests)
    split = (served + context * token_bytes(config, number)) // settings.tensor_parallel_size
    engine = split + slots + rows + FORWARD_BYTES
    token = max(trained_bytes(manifest.layout, _language(config).get("vocab_size", 0)) for manifest in manifests)
    return Required(engine, worker_bytes(weights) + sharing * MAX_KEPT_BYTES, job_bytes(weights), token)


def rows_bytes(layout: RowLayout, rows: int) -> int:
    """Return the size of a bank's rows with any frozen A, in a file and on a GPU that serves them."""
    return BF16 * (layout.a_numbers * layout.shared_a + rows * layout.row_numbers)


def _language(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the language model, also of a model with vision."""
    return {**config, **(config.get("text_config") or {})}


def worker_bytes(parameters: int) -> int:
    """Return the GPU memory of a worker: the base model in bfloat16, room for a job, and CUDA's own."""
    return BF16 * parameters + job_bytes(parameters) + CUDA_BYTES


def job_bytes(parameters: int) -> int:
    return max(MIN_TRAINING_BYTES, parameters // 2)


def trained_bytes(layout: RowLayout, words: int) -> int:
    """Return what training keeps of a token for its gradient: in the upper half of the layers, and of the logits."""
    numbers = sum(module.h_in + module.h_out for module in layout.modules) // 2
    return KEPT_BYTES * numbers + 2 * BF16 * words


def bits_of(config: Mapping[str, Any]) -> int | None:
    """Return the bits of a quantised model's weights, None if they are plain."""
    quantisation = config.get("quantization_config") or {}
    groups = quantisation.get("config_groups") or {}
    bits = [group["weights"]["num_bits"] for group in groups.values() if group.get("weights")]
    return (
        quantisation.get("bits")
        or quantisation.get("w_bit")
        or max(bits, default=None)
        or (8 if quantisation else None)
    )


@dataclass(frozen=True, slots=True)
class Needs:
    """A base model's size, with the modules that LoRAs adapt; `bytes_a_token` is in the KV cache in bfloat16."""

    parameters: int
    modules: tuple[ModuleShape, ...]
    bytes_a_token: int

    @classmethod
    def of(cls, config: Any) -> Needs:
        """Measure the model of a Hugging Face configuration, without memory for its weights."""
        import torch
        from transformers import AutoModelForCausalLM

        from adapters.training.trainer import linear_modules

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return cls(parameters, linear_modules(model), token_bytes(config.to_dict(), BF16))

    def adapter_bytes(self, rank: int) -> int:
        """Return the size of A and B of all modules, in bfloat16."""
        return BF16 * RowLayout(self.modules, rank, shared_a=False).row_numbers

    def bank_bytes(self, rank: int, rows: int) -> int:
        """Return the size of a bank's matrix: `rows`, the common row and the shared A."""
        return rows_bytes(RowLayout(self.modules, rank, shared_a=True), rows + 1)

    def on_each_of(self, cards: int) -> Needs:
        """Return what each of several cards holds; of modules that are not known to be cut, all."""

        def cut(module: ModuleShape) -> ModuleShape:
            last = module.name.rpartition(".")[2]
            h_in, h_out = (cards if last in names else 1 for names in (CUT_INPUTS, CUT_OUTPUTS))
            return replace(module, h_in=module.h_in // h_in, h_out=module.h_out // h_out)

        return Needs(self.parameters // cards, tuple(map(cut, self.modules)), self.bytes_a_token // cards)

    def engine_bytes(self, options: BuildOptions) -> int:
        """Return the GPU memory of an engine with one context, `SLOTS` slots, one bank and what it computes in."""
        room = serving_rank(options.rank + options.user_rank)
        cache, slots = CONTEXT * self.bytes_a_token, SLOTS * self.adapter_bytes(room)
        return BF16 * self.parameters + cache + slots + self.bank_bytes(options.rank, ROWS) + FORWARD_BYTES

    def table(self) -> Iterator[tuple[str, str]]:
        """Yield what is needed, in words and figures, with the defaults of `mta bank build`."""
        options = BuildOptions("chat")
        rank, room = options.rank, serving_rank(options.rank + options.user_rank)
        slot = self.adapter_bytes(room)
        yield "parameters", f"{self.parameters / 1e9:.2f} billion"
        yield "weights in bfloat16", shown(BF16 * self.parameters)
        yield f"KV cache of {CONTEXT} tokens", shown(CONTEXT * self.bytes_a_token)
        yield f"a slot of rank {room}", shown(slot)
        yield f"{SLOTS} slots", shown(SLOTS * slot)
        yield f"a bank of {ROWS} rows of rank {rank}", shown(self.bank_bytes(rank, ROWS))
        yield f"a user adapter of rank {USER_RANK}", shown(self.adapter_bytes(USER_RANK) // 2)  # half of the layers
        yield "engine: the above, and what it computes in", shown(self.engine_bytes(options))
        for cards in CARDS:
            yield f"on each of {cards} GPUs", shown(self.on_each_of(cards).engine_bytes(options))
        yield "worker: weights, a job, CUDA", shown(worker_bytes(self.parameters))


def needs_table(settings: Settings) -> Iterator[tuple[str, str]]:
    """Return the table of the base model that the settings name, from its configuration alone; BankError without it."""
    from transformers import AutoConfig

    default = settings.model == DEFAULT_MODEL
    name = str(ensure_base_model(settings.model, settings.cache_dir)) if default else settings.model
    try:
        return Needs.of(AutoConfig.from_pretrained(name)).table()
    except (OSError, ValueError) as error:
        raise BankError(f"cannot read the configuration of the base model {settings.model!r}: {error}") from error


def shown(size: int) -> str:
    unit, name = next(((unit, name) for unit, name in ((GIB, "GiB"), (MIB, "MiB")) if size >= unit), (KIB, "KiB"))
    return f"{size / unit:.1f} {name}"
