"""The sentence embedder of builds and gateways: an ONNX file (`bank/models/embedder_export.py`) and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bank.errors import BankError
from bank.items.profile import Vectors
from bank.manifest import file_sha256

if TYPE_CHECKING:
    import onnxruntime
    import tokenizers

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENS = 256
MAX_CHARS = 16 * MAX_TOKENS  # longer texts are cut before tokenisation, which takes about a second per megabyte
BATCH = 32


def check_embedder(folder: Path) -> None:
    for name in (MODEL_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise BankError(
                f"no embedder at {folder}: {name} is missing. `mta models` prepares the default one; "
                "MTA_EMBEDDER names another"
            )


class Embedder:
    """Turns texts into unit vectors. Thread-safe."""

    def __init__(self, session: onnxruntime.InferenceSession, tokenizer: tokenizers.Tokenizer, identity: str) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self.id = identity
        self.dim = int(session.get_outputs()[0].shape[1])

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> Embedder:
        """Open the embedder in `folder`; one call uses `threads` threads."""
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime sends telemetry from its import on
        import onnxruntime
        import tokenizers

        check_embedder(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the cores to the engine
        options.log_severity_level = 3
        try:
            path, providers = str(folder / MODEL_FILE), ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(path, options, providers=providers)
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            tokenizer.enable_truncation(MAX_TOKENS)
            tokenizer.enable_padding()
            return cls(session, tokenizer, file_sha256(folder / MODEL_FILE)[:16])
        except Exception as error:  # ONNX Runtime and tokenizers raise types of their own
            raise BankError(f"the embedder at {folder} cannot be loaded: {error}") from error

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts as [n, E] float32 with unit-length rows; only the first 256 tokens of a text count."""
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))  # similar lengths need less padding
        for start in range(0, len(by_length), BATCH):
            rows = by_length[start : start + BATCH]
            encoded = self._tokenizer.encode_batch([texts[row][:MAX_CHARS] for row in rows])
            feeds = {
                "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
                "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
            }
            vectors[rows] = self._session.run(None, feeds)[0]
        return vectors
