"""Choose a bank's trust in phrase tables on later answers of people, given tables of their earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bank.building.resume import Workbench
from bank.building.rows import RowTrainer
from bank.building.signer import MeasuredPerson, Signer
from bank.items.profile import Vectors
from bank.lookup.phrases import LONGEST, phrase_table, proposals
from bank.lookup.signature import Curvature
from bank.manifest import LossDifference, PhraseRule

TRUSTS = np.concatenate([[0.0], np.geomspace(0.003, 0.97, 40)])  # candidates for each length of a suffix


def fit_phrases(
    signer: Signer,
    curvature: Curvature,
    judges: Sequence[MeasuredPerson],
    trainer: RowTrainer,
    work: Workbench,
    *,
    decay: float,
) -> PhraseRule | None:
    """Return the trust that gains most, and what it gains for each judge if the others choose it; None without judges.

    It is judged on each one's merged adapter, which `curvature` and `decay` make of their earlier items.
    """
    if not judges:
        return None
    gains = work.pieces(
        [f"phrases-{position:02d}" for position in range(len(judges))],
        lambda position: _gains(signer, curvature, decay, judges[position]),
        lambda done: trainer.progress.piece("fitting the trust in phrases", done, len(judges)),
    )
    rule = chosen(np.stack(gains))
    told = ", ".join(f"{trust:.2f}" for trust in rule.trust)
    trainer.progress.say(
        f"trust in what a person repeats, by length: {told}; it changes the loss of {rule.people} people's later items "
        f"by {rule.gain.mean:+.4f} ({rule.gain.low:+.4f} to {rule.gain.high:+.4f}) nats per token"
    )
    return rule


def chosen(gains: Vectors) -> PhraseRule:
    """Return the rule for people's gains [P, lengths, candidates]; each length is chosen alone, as no token has two."""
    total, lengths = gains.sum(axis=0), range(LONGEST)
    others = (total - gains).argmax(axis=-1)
    unseen = [-float(own[lengths, best].sum()) for own, best in zip(gains, others, strict=True)]
    trust = tuple(float(each) for each in TRUSTS[total.argmax(axis=-1)])
    return PhraseRule(trust=trust, people=len(gains), gain=LossDifference.of(unseen))


def _gains(signer: Signer, curvature: Curvature, decay: float, person: MeasuredPerson) -> Vectors:
    """Return what a table of the person's earlier items gains on their later ones, [lengths, candidates].

    In nats per token, mean over the later items.
    """
    earlier, later = person.halves
    table = phrase_table([example.output for example in earlier])
    step = curvature.step(signer.signature("", earlier), decay, person.own_row)
    gains: Vectors = np.zeros((LONGEST, len(TRUSTS)), np.float32)
    for example, losses in zip(later, signer.token_losses(step, later), strict=True):
        for said, chance in zip(proposals(table, example.output), np.exp(-losses), strict=True):
            if said.length:
                kept, added = 1 - TRUSTS * said.shares, TRUSTS * said.share
                gains[said.length - 1] += np.log(kept + added / chance) / len(losses) / len(later)
    return gains
