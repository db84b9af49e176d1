"""How what is known of a user becomes weights, with the constants measured at build; and what was measured of the bank.

Parts of the manifest.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PosteriorRule(Frozen):
    """How a signature becomes steps from the common row (`bank/lookup/signature.py`).

    Attributes:
        anchors: K, along how many rows a user may step; the longest steps count.
        decay: λ in units of tr H / N: about as many output tokens as it takes to trust the evidence.
    """

    anchors: int = Field(default=1024, ge=1)
    decay: float = Field(default=250.0, gt=0)


class WeightRule(Frozen):
    """How a profile becomes weights (`bank/lookup/weights.py`).

    Attributes:
        anchors: K, how many anchors take part by topics.
        strength: what their weights sum to; below 1 only beside a common row.
        posterior: what takes over once a user has a signature; None in banks without a common row.
    """

    anchors: int = Field(default=2, ge=1)
    strength: float = Field(default=1.0, gt=0, le=1)
    posterior: PosteriorRule | None = None


class AnswerPrior(Frozen):
    """What people answer before anything is read (`bank/lookup/prior.py`).

    Attributes:
        weight: how many of a person's own answers everybody's shares count for.
        shares: everybody's, by answer; they sum to 1.
    """

    weight: float = Field(gt=0)
    shares: dict[str, float]


class LossDifference(Frozen):
    """A difference in loss over people, nats a token, with its 95 % interval; negative is better.

    `mean` is that of a typical person: the median of the means of any two.
    """

    mean: float
    low: float
    high: float

    @property
    def lower(self) -> bool:
        """Whether it is below 0, surely."""
        return self.high < 0

    @property
    def higher(self) -> bool:
        """Whether it is above 0, surely."""
        return self.low > 0


class Verdict(Frozen):
    """What a bank does for people who were left out of it (`bank/evaluation/verdict.py`).

    All that is compared is the loss of their own later answers. `common` is the common row alone, or the base model of
    a bank without one.

    Attributes:
        people: how many there were.
        losses: their mean loss by method, nats a token.
        merged: the bank's own rule less `common`.
        recalled: `common` with `history` past items in the prompt, or one where that is 0, less `common`.
        both: the bank's own rule with them, less that without.
        beyond: the same less `common` with them: what the adapters add.
        prior: the bank's own rule less the histogram of the person's answers; None for free answers.
        history: how many past items prompts get by default.
    """

    people: int = Field(ge=1)
    losses: dict[str, float]
    merged: LossDifference
    recalled: LossDifference
    both: LossDifference
    beyond: LossDifference
    prior: LossDifference | None = None
    history: int = Field(default=0, ge=0)
