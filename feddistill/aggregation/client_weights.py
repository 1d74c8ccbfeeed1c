"""The clients' weights: from the numbers that they report, or from their answers on labels the server knows.

Shapes: ``C`` clients, ``N`` proxy texts or positions, ``V`` classes, ``M`` texts with a known label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddistill.types import ClientDescription

BETTER_THAN_CHANCE = 1.2
"""Weights by validation: a client whose accuracy is below this multiple of chance has weight 0."""

FLOOR = 0.1
"""Verified weights are at least this multiple of an equal share, so that no client loses all influence."""

CAP = 3.0
"""Verified weights are at most this multiple of an equal share, so that no client decides alone."""

FOLDS = 5
"""Folds of the labelled texts: a text gets the weights fitted to the other folds, not to itself."""

ENOUGH = 30
"""A domain with fewer labelled texts gets the weights fitted to all domains together."""

LEAST = 1e-9
"""Lower bound on the probability of a true label."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Weights:
    """One weight per client, per client and class, or per client and row. Not normalised."""

    values: Tensor
    """``[C]``, ``[C, V]`` or ``[C, N]``."""
    by: Literal["client", "class", "row"] = "client"

    def rows(self, start: int, stop: int) -> Tensor:
        """Weights ``[C]``, or ``[C, n]`` of the rows from ``start`` to ``stop``."""
        assert self.by != "class", "weights by class have no rows"
        return self.values if self.by == "client" else self.values[:, start:stop]

    def shares(self, like: Tensor, start: int, stop: int) -> Tensor:
        """The weights normalised over clients, shaped to broadcast over ``like [C, n, W]``."""
        values = (self.values if self.by == "class" else self.rows(start, stop)).to(like)
        shares = values / values.sum(0)
        if self.by == "client":
            return shares[:, None, None]
        return shares[:, None, :] if self.by == "class" else shares[:, :, None]

    def mean_shares(self) -> tuple[float, ...]:
        """Each client's share, averaged over classes or rows."""
        shares = (self.values / self.values.sum(0)).double().reshape(len(self.values), -1)
        return tuple(round(float(share), 6) for share in shares.numpy().mean(1))


def by_size(descriptions: Sequence[ClientDescription]) -> Weights:
    """Weights in proportion to the number of private examples."""
    return Weights(torch.tensor([float(d.examples or 0) for d in descriptions]))


def by_class_counts(descriptions: Sequence[ClientDescription], classes: int) -> Weights:
    """Weights by class: client ``k`` has the share ``n_kc / sum_j n_jc`` of class ``c``.

    A class that no client reports has equal shares.
    """
    counts = class_counts(descriptions, classes)
    return Weights(torch.where(counts.sum(0) > 0, counts, 1.0).float(), "class")


def class_counts(descriptions: Sequence[ClientDescription], classes: int) -> Tensor:
    """``[C, V]``, float64: the reported class counts."""
    counts = torch.tensor([d.class_counts for d in descriptions], dtype=torch.float64)
    assert counts.shape == (len(descriptions), classes), "a count for each client and class"
    return counts


def by_validation(accuracy: Array, classes: int) -> Weights | None:
    """Weights in proportion to ``accuracy [C]`` on labelled texts; 0 below 1.2 times chance.

    ``None``, equal weights, if all would be 0.
    """
    values = np.where(accuracy >= BETTER_THAN_CHANCE / classes, accuracy, 0.0)
    return Weights(torch.from_numpy(values).float()) if values.any() else None


def by_confidence(entropy: Tensor, log_vocab: float) -> Weights:
    """Weights ``1 - H / log V`` by row, from ``entropy [C, N]``: in proportion to a client's certainty.

    An attack vector: an attacker can be certain of everything.
    """
    return Weights((1 - entropy / log_vocab).clamp_min(1e-3), "row")


def verified(truth: Array, rows: NDArray[np.int64], domains: NDArray[np.int64]) -> Weights:
    """Weights by row with which the mixture explains the true labels of the row's domain best (EM).

    ``argmax_w sum_m log sum_k w_k p_k(label_m)`` with ``FLOOR / C <= w_k <= CAP / C``. A labelled row gets
    the weights fitted to the other folds; every other row those fitted to all labelled rows.

    Args:
        truth: ``[C, M]``, log-probability of the true label in each labelled row.
        rows: ``[M]``, indices of the labelled rows.
        domains: ``[N]``, small integers; all 0 if there is one domain.

    >>> good, bad = np.log([0.9] * 40), np.log([0.01] * 40)
    >>> rows = np.arange(40)
    >>> verified(np.stack([good, good, bad]), rows, np.zeros(50, int)).mean_shares()
    (0.483333, 0.483333, 0.033333)
    """
    likelihood = np.maximum(np.exp(truth), LEAST)
    folds = np.arange(len(rows)) % FOLDS
    values = np.empty((len(truth), len(domains)))
    overall = _by_fold(likelihood, folds)
    for domain in np.unique(domains):
        inside = domains[rows] == domain
        fitted = _by_fold(likelihood[:, inside], folds[inside]) if inside.sum() >= ENOUGH else overall
        values[:, domains == domain] = fitted[-1][:, None]
        for fold in range(FOLDS):
            values[:, rows[inside & (folds == fold)]] = fitted[fold][:, None]
    return Weights(torch.from_numpy(values), "row")


def by_verified_counts(truth: Array, descriptions: Sequence[ClientDescription], classes: int) -> Weights:
    """Class counts times the client's verified share: a client that claims a class has to prove it."""
    counts = by_class_counts(descriptions, classes).values
    shares = _by_fold(np.maximum(np.exp(truth), LEAST), np.zeros(truth.shape[1], np.int64))[-1]
    # FLOOR keeps a class that only clients with the least share claim.
    return Weights(counts * torch.from_numpy(shares)[:, None].float(), "class")


def mixture_weights(likelihood: Array, floor: float, cap: float) -> Array:
    """``argmax_w sum_m log sum_k w_k likelihood_km``, ``[C]``, with sum 1 and within ``[floor, cap]``."""
    w = np.full(len(likelihood), 1 / len(likelihood))
    for _ in range(200):
        joint = w[:, None] * likelihood
        new = _within((joint / joint.sum(0)).mean(1), floor, cap)
        done = np.abs(new - w).max() < 1e-7
        w = new
        if done:
            break
    return w


def _by_fold(likelihood: Array, folds: NDArray[np.int64]) -> list[Array]:
    """Weights fitted without each of the folds, and last those fitted to all rows."""
    clients = len(likelihood)
    subsets = [folds != fold for fold in range(FOLDS)] + [np.ones(len(folds), bool)]
    return [
        mixture_weights(likelihood[:, subset], FLOOR / clients, min(1.0, CAP / clients))
        if subset.any()
        else np.full(clients, 1 / clients)
        for subset in subsets
    ]


def _within(target: Array, floor: float, cap: float) -> Array:
    """``argmax_w sum target log w`` with sum 1 and within the bounds: ``target`` scaled and clipped."""
    low, high = 0.0, 1.0 / floor
    for _ in range(60):
        scale = (low + high) / 2
        if np.clip(scale * target, floor, cap).sum() < 1:
            low = scale
        else:
            high = scale
    w = np.clip(high * target, floor, cap)
    return np.asarray(w / w.sum(), np.float64)
