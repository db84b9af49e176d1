"""Describe anchors by words that their rows make likelier behind neutral texts: no text of a person is read for it."""

from __future__ import annotations

import numpy as np

from bank.building.readings import TEXTS
from bank.building.resume import Workbench
from bank.building.rows import RowTrainer
from bank.building.signer import Signer
from bank.items.profile import Vectors
from bank.items.prompt import encode_pair
from bank.lookup.prior import allowed_answers

WORDS = 6  # of an anchor
_STARTS, _LETTERS = ("Ġ", "▁"), 3  # how tokenizers mark the first token of a word; letters of the shortest that tells


def likelier_words(signer: Signer, anchors: int, trainer: RowTrainer, work: Workbench) -> list[tuple[str, ...]]:
    """Return each anchor's words, the one with most weight in p·log(p/q) first; none where answers are labels.

    p is a word's chance with the anchor's row, and q without it, mean over the texts' positions. Only whole words in
    lower case count, which are no names.
    """
    known = _words_of(trainer)
    if allowed_answers(trainer.task) or not known:
        return [()] * anchors
    texts = [encode_pair(trainer.tokenizer, *pair, trainer.options.max_tokens) for pair in TEXTS]
    ids = np.array(list(known))
    (before,) = signer.log_chances(np.zeros((1, anchors), np.float32), texts)

    def likelier(anchor: int) -> Vectors:
        (after,) = signer.log_chances(np.eye(anchors, dtype=np.float32)[[anchor]], texts)
        told = (np.exp(after) * (after - before)).mean(axis=0)[ids]
        ranked = ids[np.argsort(-told, kind="stable")]
        return np.asarray(ranked[: min(WORDS, int((told > 0).sum()))], np.float32)

    said = trainer.progress.piece
    names = [f"words-{anchor:04d}" for anchor in range(anchors)]
    words = work.pieces(names, likelier, lambda done: said("describing the anchors", done, anchors))
    return [tuple(known[int(token)] for token in tokens) for tokens in words]


def _words_of(trainer: RowTrainer) -> dict[int, str]:
    """Return the tokens that are a whole word in lower case, but for the commonest English ones, by their ids."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    ids = range(len(trainer.tokenizer))
    marked = trainer.tokenizer.convert_ids_to_tokens(list(ids))
    words = {token: trainer.tokenizer.decode([token]).strip() for token in ids if marked[token].startswith(_STARTS)}
    return {
        token: word
        for token, word in words.items()
        if len(word) >= _LETTERS and word.isalpha() and word.islower() and word not in ENGLISH_STOP_WORDS
    }
