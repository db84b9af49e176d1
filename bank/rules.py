"""The rules of a bank: how what is known of a user becomes weights, with the constants that were measured at build.

And what was measured of the bank itself.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SignatureRule(Frozen):
    """How a signature becomes weights: strength × softmax(τ·√n·gain + κ·cosine) over the best K.

    The certainty of a mean over n tokens grows with √n, so τ counts gains by how far they are from chance; with n
    itself a few long items would choose a single anchor.

    Attributes:
        anchors: K, how many anchors take part.
        strength: what their weights sum to; below 1 only beside a common row.
        tau: τ, how much evidence counts.
        kappa: κ, how much similarity of topics counts beside it.
        slope: a, what predicted gains are multiplied by.
        offsets: c, one per anchor (`bank/lookup/signature.py`).
    """

    anchors: int = Field(default=16, ge=1)
    strength: float = Field(default=1.0, gt=0, le=1)
    tau: float = Field(default=2.0, ge=0)
    kappa: float = Field(default=0.0, ge=0)
    slope: float = Field(default=1.0, ge=0)
    offsets: tuple[float, ...] = ()


class PosteriorRule(Frozen):
    """How a signature becomes steps from the common row (`bank/lookup/posterior.py`).

    Attributes:
        anchors: K, along how many rows a user may step; the longest steps count.
        decay: λ in units of tr H / N: about as many output tokens as it takes to trust the evidence.
    """

    anchors: int = Field(default=1024, ge=1)
    decay: float = Field(default=250.0, gt=0)


class WeightRule(Frozen):
    """How a profile becomes weights (`bank/lookup/weights.py`).

    Attributes:
        anchors: K, how many anchors take part when weights come from topics.
        strength: what their weights sum to; below 1 only beside a common row.
        signature: how a user's signature becomes shares; None in banks without such signatures.
        posterior: how it becomes steps from the common row instead; None in banks whose weights are shares.
    """

    anchors: int = Field(default=2, ge=1)
    strength: float = Field(default=1.0, gt=0, le=1)
    signature: SignatureRule | None = None
    posterior: PosteriorRule | None = None

    @property
    def source(self) -> Literal["topic", "signature"]:
        """Which evidence comes first."""
        return "signature" if self.signature or self.posterior else "topic"


class AnswerPrior(Frozen):
    """What people answer before anything is read (`bank/lookup/prior.py`).

    Attributes:
        weight: how many of a person's own answers everybody's shares count for.
        shares: everybody's, by answer; they sum to 1.
    """

    weight: float = Field(gt=0)
    shares: dict[str, float]


class Difference(Frozen):
    """A difference in loss over people, nats a token, with its 95 % interval; negative is better.

    Attributes:
        mean: that of a typical person: the median of the means of any two.
        low, high: the interval's ends.
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
    merged: Difference
    recalled: Difference
    both: Difference
    beyond: Difference
    prior: Difference | None = None
    history: int = Field(default=0, ge=0)
