"""A tiny random Llama and banks of random rows for any model: real files for real processes, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from adapters.lora import RowLayout
from adapters.recipe import FusionMethod
from adapters.training.example import Acts
from adapters.training.trainer import linear_modules
from bank.building.assemble import Anchors, BankRows, Basis, Rules, write_bank
from bank.building.directions import make_directions
from bank.building.readings import record_canary
from bank.items.profile import Vectors
from bank.lookup.embedder import Embedder
from bank.lookup.signature import Curvature
from bank.manifest import EmbedderId, LossDifference, PhraseRule, PosteriorRule, WeightRule
from bank.models.folders import base_model_id
from bank.models.load import load_base

PHRASES = PhraseRule(trust=(0.3, 0.5, 0.8, 0.9), people=7, gain=LossDifference(mean=-0.2, low=-0.3, high=-0.1))
CHAT_TEMPLATE = (  # strict, as many models' are
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "{% if not loop.first and message['role'] == loop.previtem['role'] %}"
    "{{ raise_exception('after ' + message['role'] + ' comes another role') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "initializer_range": 0.1,  # large enough for adapters to change the greedy token
}

WORLDS = ("surfing and the sea", "office planning", "growing roses", "chess openings", "baking bread", "old trains")


def tiny_model(folder: Path, *, context: int = 512) -> Path:
    """Write a random Llama with a byte-level tokenizer and a chat template."""
    # Two heads of each kind divide over two tensor-parallel ranks.
    options = {"tie_word_embeddings": False, "num_attention_heads": 2, "max_position_embeddings": context}
    return random_model(folder, "llama", options)


def random_model(
    folder: Path,
    model_type: str,
    options: Mapping[str, object],
    *,
    template: str = CHAT_TEMPLATE,
    around: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Path:
    """Write a random model with a byte-level tokenizer.

    Args:
        folder: the model's folder.
        model_type: the architecture, as Hugging Face names it.
        options: its configuration, beyond `SHAPE`.
        template: its chat template.
        around: configuration of the model of which this is the language model.
        seed: seed of the weights.
    """
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|pad|>"))
    special = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": pad}
    given: dict[str, object] = SHAPE | special | dict(options)
    if around:
        given = {"text_config": given, **around}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**given)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weightless_model(folder: Path, **shape: int) -> Path:
    """Write a Llama of any shape without weights, for vLLM's `--load-format dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(shape["vocab_size"])
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|pad|>"))
    config = LlamaConfig(eos_token_id=end, pad_token_id=pad, bos_token_id=None, dtype="bfloat16", **shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # a bank is made for a model with weights
    return folder


def tiny_bank(
    folder: Path,
    model_folder: Path,
    embedder_folder: Path,
    *,
    anchors: int = 4,
    method: FusionMethod = FusionMethod.SHARED,
    common: bool = True,
    rank: int = 4,
    user_rank: int = 4,
    k: int = 2,
    targets: Sequence[str] | None = None,
    scale: float = 0.05,
    signs: bool = False,
    directions: int | None = None,
    acts: Acts = Acts.EVERYWHERE,
    task: str = "chat",
    seed: int = 1,
    name: str = "tiny",
    embeddings: Vectors | None = None,
    canary: bool = False,
) -> Path:
    """Write a bank of random rows for a model, with an index of real embeddings.

    Args:
        folder: the bank's folder; created if needed.
        model_folder: the base model; only its configuration is read.
        embedder_folder: the embedder for the index.
        anchors: number of anchors, N; anchor i embeds the text `world(i)`.
        method, common, rank, user_rank, k: as in `mta bank build`.
        targets: last name parts of the adapted modules; by default all linear modules.
        scale: standard deviation of the rows' numbers.
        signs: whether the bank has the posterior, with a curvature of 1 along every row.
        directions: number of directions that replace the rows; the bank has the posterior.
        acts: from where on the rows are personal.
        task: type of the items.
        seed: seed of the rows.
        name: name of the base model.
        embeddings: embeddings [N, E] of the anchors, instead of those of texts.
        canary: whether to record the bank's canary, which reads a text with the model in float32.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    layout = RowLayout(linear_modules(model, targets), rank, method is FusionMethod.SHARED)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(layout.row_numbers, generator=generator) * scale for _ in range(anchors + common)]
    shared_a = torch.randn(layout.a_numbers, generator=generator) * scale if layout.shared_a else None
    embedder = Embedder.load(embedder_folder)
    posterior, curvature, made = None, None, None
    if signs:
        posterior, curvature = PosteriorRule(), np.eye(anchors, dtype=np.float32)
    if directions:
        curvature = np.diag(1 + np.arange(anchors, dtype=np.float32) / anchors)
        made = make_directions(Curvature.of(curvature), directions, deviation=1.0)
        posterior = made.rule
    write_bank(
        folder,
        Basis(task, base_model_id(name, model_folder), EmbedderId(id=embedder.id, dim=embedder.dim), user_rank),
        BankRows(layout, rows, shared_a, common, made),
        Anchors(embedder.embed(list(map(world, range(anchors)))) if embeddings is None else embeddings, [12] * anchors),
        Rules(WeightRule(anchors=k, posterior=posterior), curvature, phrases=PHRASES),
        training={"seed": seed, "acts": acts, "dtype": "float32"},
        record=partial(record_canary, *load_base(model_folder, "float32")) if canary else None,
    )
    return folder


def world(index: int) -> str:
    """Return the text that anchor `index` embeds: a user who writes it is nearest to that anchor."""
    turn, world = divmod(index, len(WORLDS))
    return WORLDS[world] if not turn else f"{WORLDS[world]}, chapter {turn}"


def byte_tokenizer(size: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and the chat marks, filled up to `size` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [f"filler{i}" for i in range(size - len(alphabet) - len(SPECIAL))]
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast
