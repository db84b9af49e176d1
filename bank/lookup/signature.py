"""Signatures, which summarise a user's own items, and the posterior-mean step that a signature justifies.

For a step of zᵢ along each anchor's row from the common row, the loss of a user's n output tokens is about
n(L₀ − x·z + ½ zᵀHz), where xᵢ = −⟨g, rowᵢ⟩, g is the gradient of the user's mean loss per token, and H is the curvature
measured at build. With a prior N(z₀, I/λ) on z, the posterior mean is z = (nH + λI)⁻¹ (n x + λ z₀), so only x is
stored. z₀ are the weights by topic, which serve without a signature: a user's first items move on from there.
This module needs numpy alone, for gateways; the build and the worker compute signatures (`bank/building/signer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.recipe import MAX_DIRECTIONS
from bank.errors import BankError
from bank.items.profile import Vectors

SMALLEST = 1e-6  # part of an eigenvector that is told from none when a row is left out
MAX_ITEMS = 32  # maximum number of a user's newest items in a signature


@dataclass(frozen=True, slots=True)
class Signature:
    """The effect of the anchors' rows on the loss of a user's items."""

    bank: str  # 8 hex digits of the bank's fingerprint
    tokens: int  # n, number of output tokens in the items: the amount of evidence
    products: Vectors  # x [N] float32: first-order decrease of the loss along each anchor's row, in nats per token

    @property
    def finite(self) -> bool:
        """Whether the products and their norm are finite in float32."""
        return self.length <= float(np.finfo(np.float32).max)

    def and_more(self, other: Signature) -> Signature:
        """Return the signature of these items and the other's; the other's alone if this is for another bank."""
        if self.bank != other.bank or not self.tokens:
            return other
        weight, tokens = np.float32(other.tokens / (self.tokens + other.tokens)), self.tokens + other.tokens
        return Signature(self.bank, tokens, self.products + weight * (other.products - self.products))

    @property
    def length(self) -> float:
        return float(np.linalg.norm(self.products.astype(np.float64)))

    def is_usable_for(self, bank: str) -> bool:
        """Whether this signature is for `bank` (8 hex digits), not empty, and finite."""
        return self.tokens > 0 and self.bank == bank and bool(np.isfinite(self.products).all())


def empty_signature(bank: str, anchors: int) -> Signature:
    """Return a signature without evidence."""
    return Signature(bank, 0, np.zeros(anchors, np.float32))


@dataclass(frozen=True, slots=True)
class Curvature:
    """Eigendecomposition of H: eigenvectors [N, N] in columns, and non-negative eigenvalues [N]."""

    eigenvectors: Vectors
    eigenvalues: Vectors

    @classmethod
    def of(cls, measured: Vectors) -> Curvature:
        """Symmetrise a measured H [N, N] and clip its eigenvalues at 0; BankError if no eigenvalue is positive."""
        h = np.asarray(measured, np.float64)
        if not np.isfinite(h).all():
            raise BankError("the curvature of this bank is not finite: build the bank again")
        eigenvalues, eigenvectors = np.linalg.eigh((h + h.T) / 2)
        eigenvalues = np.clip(eigenvalues, 0.0, None)
        if not eigenvalues.any():
            raise BankError(
                "the loss has no positive curvature along any of this bank's rows: build the bank with other people, "
                "more --steps or a higher --learning-rate"
            )
        return cls(eigenvectors, eigenvalues)

    @classmethod
    def load(cls, path: Path) -> Curvature:
        try:
            return cls.of(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise BankError(f"cannot read {path}: {error}") from error

    def first(self, count: int) -> Curvature:
        """Return the curvature along the first `count` rows."""
        whole = (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T
        return Curvature.of(np.asarray(whole[:count, :count], np.float64))

    def gains(self, step: Vectors, signature: Signature, without: int | None = None) -> Vectors:
        """Return what a step [N] gains on the signature's items along the 1, 2, … N leading directions, [N].

        In nats per token, as predicted from the products; more than `MAX_DIRECTIONS` count as all. With a row left out,
        whose step is 0, directions are those of the other rows.
        """
        z, x = (self.eigenvectors.T @ np.asarray(of, np.float64) for of in (step, signature.products))
        gains = np.full(len(step), z @ x - self.eigenvalues @ z**2 / 2)
        if without is None:
            values, z, x = self.eigenvalues[::-1], z[::-1], x[::-1]
        else:
            values, vectors = self._leading_without(without, min(MAX_DIRECTIONS, len(step) - 1))
            z, x = vectors.T @ z, vectors.T @ x
        leading = np.cumsum(z * x - values * z**2 / 2)[:MAX_DIRECTIONS]
        gains[: len(leading)] = leading
        return gains

    def step(
        self, signature: Signature, decay: float, without: int | None = None, topics: Vectors | float = 0.0
    ) -> Vectors:
        """Return z [N]; `decay` is λ in units of tr H / N, and `topics` are z₀ [N], where it is without evidence.

        With a row left out, the step is as if H were without it.
        """
        values, prior = self.eigenvalues, self.eigenvalues.mean()
        if without is not None:
            prior = (values.sum() - self.eigenvectors[without] ** 2 @ values) / (len(values) - 1)
        x = np.asarray(signature.products + decay * prior / signature.tokens * topics, np.float64)
        if without is not None:
            x[without] = 0
        shrunk = signature.tokens / (signature.tokens * values + decay * prior)
        step = self.eigenvectors @ (shrunk * (self.eigenvectors.T @ x))
        if without is not None:  # the inverse of a matrix without one row and column, from the inverse with it
            column = self.eigenvectors @ (shrunk * self.eigenvectors[without])
            step -= step[without] / column[without] * column
            step[without] = 0
        return np.asarray(step, np.float32)

    def _leading_without(self, row: int, count: int) -> tuple[Vectors, Vectors]:
        """Return the leading eigenvalues [K] of H without a row, and their eigenvectors [N, K] in the basis of H's.

        Between any two neighbours of the eigenvalues eⱼ of H lies one, the root y of Σ vⱼ² / (eⱼ - y), with v the row
        of H's eigenvectors; its eigenvector is vⱼ / (eⱼ - y) (Golub 1973, Some modified matrix eigenvalue problems).
        """
        v = self.eigenvectors[row]
        v = np.where(np.abs(v) < SMALLEST, SMALLEST, v)
        e = self.eigenvalues + self.eigenvalues.max() * SMALLEST**2 * np.arange(len(v))  # no two are equal
        above, gap = e[: -count - 1 : -1], np.diff(e)[::-1][:count]
        low, high = np.zeros(count), np.ones(count)  # of the way from the neighbour above to that below
        for _ in range(60):
            middle = (low + high) / 2
            apart = e[:, None] - above + middle * gap
            is_above = (v[:, None] ** 2 / apart).sum(axis=0) > 0
            low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
        return above - middle * gap, v[:, None] / apart / np.linalg.norm(v[:, None] / apart, axis=0)
