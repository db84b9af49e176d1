"""Export a BERT-like sentence embedder as ONNX, by operators: no exporter changes its hash, the embedder's id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bank.errors import BankError
from bank.lookup.embedder import MODEL_FILE, TOKENIZER_FILE

if TYPE_CHECKING:
    import onnx

OPSET = 20  # the first opset with Gelu; LayerNormalization needs 17
IR_VERSION = 9
_PADDING_BIAS = -1e9  # added to attention scores of padding

Weights = Mapping[str, npt.NDArray[Any]]


def export_embedder(source: Path, target: Path) -> None:
    import onnx
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text("utf-8"))
    kind = tuple(config.get(key) for key in ("model_type", "hidden_act", "position_embedding_type"))
    if kind not in (("bert", "gelu", "absolute"), ("bert", "gelu", None)):
        raise BankError(
            f"cannot export the embedder at {source}: only BERT encoders with gelu and absolute positions are "
            f"supported, this is {kind}. Set MTA_EMBEDDER to a folder with {MODEL_FILE} and {TOKENIZER_FILE} instead"
        )
    onnx.save(encoder_model(config, load_file(source / "model.safetensors")), target / MODEL_FILE)
    shutil.copyfile(source / TOKENIZER_FILE, target / TOKENIZER_FILE)


def encoder_model(config: Mapping[str, Any], weights: Weights) -> onnx.ModelProto:
    """Build the ONNX model: `input_ids` and `attention_mask` [n, tokens] to unit-length `embedding` [n, E]."""
    from onnx import TensorProto, helper

    graph = _Graph(config, weights)
    hidden = _embeddings(graph)
    # The bias [n, 1, 1, tokens] is 0 for tokens and `_PADDING_BIAS` for padding.
    mask = graph.op("Cast", "attention_mask", to=TensorProto.FLOAT)
    padding = graph.op("Sub", graph.constant(1.0, np.float32), mask)
    bias = graph.op("Mul", padding, graph.constant(_PADDING_BIAS, np.float32))
    bias = graph.op("Unsqueeze", bias, graph.constant([1, 2], np.int64))
    for layer in range(config["num_hidden_layers"]):
        hidden = _layer(graph, f"encoder.layer.{layer}", hidden, bias)
    _pool(graph, hidden)
    inputs = ("input_ids", "attention_mask")
    tokens = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "tokens"]) for name in inputs]
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", config["hidden_size"]])
    return helper.make_model(
        helper.make_graph(graph.nodes, "embedder", tokens, [embedding], graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )


class _Graph:
    """Collects nodes and initializers; methods take and return names of outputs."""

    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: object) -> str:
        from onnx import helper

        output = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, value: npt.ArrayLike, dtype: type[np.generic], name: str | None = None) -> str:
        from onnx import numpy_helper

        name = name or f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype=dtype), name))
        return name

    def weight(self, name: str, transpose: bool = False) -> str:
        value = self.weights[name]
        return self.constant(value.T if transpose else value, np.float32, name)

    def linear(self, x: str, module: str) -> str:
        product = self.op("MatMul", x, self.weight(f"{module}.weight", transpose=True))
        return self.op("Add", product, self.weight(f"{module}.bias"))

    def layer_norm(self, x: str, module: str) -> str:
        scale, shift = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=float(self.config["layer_norm_eps"]))


def _embeddings(graph: _Graph) -> str:
    """Add the embeddings [n, tokens, E]: word, position and first token type."""
    words = graph.op("Gather", graph.weight("embeddings.word_embeddings.weight"), "input_ids")
    length = graph.op("Shape", "input_ids", start=1, end=2)
    zero = graph.constant([0], np.int64)
    axis = graph.constant([0], np.int64)
    positions = graph.op("Slice", graph.weight("embeddings.position_embeddings.weight"), zero, length, axis)
    first_type = graph.constant(graph.weights["embeddings.token_type_embeddings.weight"][0], np.float32)
    total = graph.op("Add", graph.op("Add", words, positions), first_type)
    return graph.layer_norm(total, "embeddings.LayerNorm")


def _layer(graph: _Graph, module: str, hidden: str, bias: str) -> str:
    heads, size = graph.config["num_attention_heads"], graph.config["hidden_size"]
    split = graph.constant([0, 0, heads, size // heads], np.int64)
    join = graph.constant([0, 0, size], np.int64)

    def head(part: str, order: list[int]) -> str:
        projected = graph.linear(hidden, f"{module}.attention.self.{part}")
        return graph.op("Transpose", graph.op("Reshape", projected, split), perm=order)

    query, key, value = head("query", [0, 2, 1, 3]), head("key", [0, 2, 3, 1]), head("value", [0, 2, 1, 3])
    scale = graph.constant((size // heads) ** -0.5, np.float32)
    scores = graph.op("Add", graph.op("Mul", graph.op("MatMul", query, key), scale), bias)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    context = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), join)
    attended = graph.op("Add", graph.linear(context, f"{module}.attention.output.dense"), hidden)
    hidden = graph.layer_norm(attended, f"{module}.attention.output.LayerNorm")
    wide = graph.op("Gelu", graph.linear(hidden, f"{module}.intermediate.dense"))
    narrow = graph.op("Add", graph.linear(wide, f"{module}.output.dense"), hidden)
    return graph.layer_norm(narrow, f"{module}.output.LayerNorm")


def _pool(graph: _Graph, hidden: str) -> None:
    """Average over the tokens that are not padding, then scale to unit length."""
    from onnx import TensorProto

    token_axis, last_axis = graph.constant([1], np.int64), graph.constant([-1], np.int64)
    mask = graph.op("Cast", graph.op("Unsqueeze", "attention_mask", last_axis), to=TensorProto.FLOAT)
    total = graph.op("ReduceSum", graph.op("Mul", hidden, mask), token_axis, keepdims=0)
    mean = graph.op("Div", total, graph.op("ReduceSum", mask, token_axis, keepdims=0))
    norm = graph.op("ReduceL2", mean, last_axis, keepdims=1)
    graph.op("Div", mean, norm, name="embedding")
