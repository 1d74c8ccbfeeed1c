"""Who counts how much: from what clients say of themselves, or from how they do on labels the server has.

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
"""A client whose accuracy is below this many times chance has no weight by validation."""

FLOOR = 0.1
"""Verified weights: at least this share of an equal one, so that nobody is silenced for good."""

CAP = 3.0
"""Verified weights: at most this many equal shares, so that nobody speaks for all."""

FOLDS = 5
"""Labelled texts are weighted by what the other folds say: a client is not paid for guessing their labels."""

ENOUGH = 30
"""Labelled texts of a domain below which it has the weights of all domains together."""

LEAST = 1e-9
"""Probability of the true label below which nothing is told apart."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Weights:
    """Of each client: one weight, one for each class, or one for each row. Not normalised."""

    values: Tensor
    """``[C]``, ``[C, V]`` or ``[C, N]``."""
    by: Literal["client", "class", "row"] = "client"

    def rows(self, start: int, stop: int) -> Tensor:
        """Weights ``[C]``, or ``[C, n]`` of these rows."""
        assert self.by != "class", "weights by class are not those of rows"
        return self.values if self.by == "client" else self.values[:, start:stop]

    def shares(self, like: Tensor, start: int, stop: int) -> Tensor:
        """Normalised over clients, and so shaped that they broadcast over ``like [C, n, W]``."""
        values = (self.values if self.by == "class" else self.rows(start, stop)).to(like)
        shares = values / values.sum(0)
        if self.by == "client":
            return shares[:, None, None]
        return shares[:, None, :] if self.by == "class" else shares[:, :, None]

    def mean_shares(self) -> tuple[float, ...]:
        """Of each client, over classes or rows."""
        shares = (self.values / self.values.sum(0)).double().reshape(len(self.values), -1)
        return tuple(round(float(share), 6) for share in shares.numpy().mean(1))


def by_size(descriptions: Sequence[ClientDescription]) -> Weights:
    """In proportion to the private examples."""
    return Weights(torch.tensor([float(d.examples or 0) for d in descriptions]))


def by_class_counts(descriptions: Sequence[ClientDescription], classes: int) -> Weights:
    """Client ``k`` speaks for class ``c`` in proportion to ``n_kc / sum_j n_jc``.

    For a class that nobody reports, all speak alike.
    """
    counts = class_counts(descriptions, classes)
    return Weights(torch.where(counts.sum(0) > 0, counts, 1.0).float(), "class")


def class_counts(descriptions: Sequence[ClientDescription], classes: int) -> Tensor:
    """``[C, V]``, float64, as reported."""
    counts = torch.tensor([d.class_counts for d in descriptions], dtype=torch.float64)
    assert counts.shape == (len(descriptions), classes), "a count for each client and class"
    return counts


def by_validation(accuracy: Array, classes: int) -> Weights | None:
    """In proportion to accuracy ``[C]`` on labelled texts; 0 below 1.2 times chance.

    ``None``, equal weights, where all are.
    """
    values = np.where(accuracy >= BETTER_THAN_CHANCE / classes, accuracy, 0.0)
    return Weights(torch.from_numpy(values).float()) if values.any() else None


def by_confidence(entropy: Tensor, log_vocab: float) -> Weights:
    """``1 - H / log V`` of each answer, ``entropy [C, N]``: a client counts as much as it is sure.

    An attack vector: a liar is sure of everything.
    """
    return Weights((1 - entropy / log_vocab).clamp_min(1e-3), "row")


def verified(truth: Array, rows: NDArray[np.int64], domains: NDArray[np.int64]) -> Weights:
    """EM mixture weights: those under which the mixture explains the true labels best, by domain.

    ``argmax_w sum_m log sum_k w_k p_k(label_m)`` with ``FLOOR / C <= w_k <= CAP / C``. A labelled row has
    the weights that the other folds' rows give; every other row those of all.

    Args:
        truth: ``[C, M]``, log-probability of the true label at each labelled row.
        rows: ``[M]``, which rows these are.
        domains: ``[N]``, small integers; all 0 for one domain.

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
        here = domains[rows] == domain
        found = _by_fold(likelihood[:, here], folds[here]) if here.sum() >= ENOUGH else overall
        values[:, domains == domain] = found[-1][:, None]
        for fold in range(FOLDS):
            values[:, rows[here & (folds == fold)]] = found[fold][:, None]
    return Weights(torch.from_numpy(values), "row")


def by_verified_counts(truth: Array, descriptions: Sequence[ClientDescription], classes: int) -> Weights:
    """Class counts, each client's times its verified share: who claims to know a class has to show it."""
    counts = by_class_counts(descriptions, classes).values
    shares = _by_fold(np.maximum(np.exp(truth), LEAST), np.zeros(truth.shape[1], np.int64))[-1]
    # A class that only silenced clients claim is still theirs.
    return Weights(counts * torch.from_numpy(shares)[:, None].float(), "class")


def mixture_weights(likelihood: Array, floor: float, cap: float) -> Array:
    """``[C]`` of sum 1 within ``[floor, cap]`` that maximise ``sum_m log sum_k w_k likelihood_km``."""
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
    """Weights without each fold, and in the end of all."""
    clients = len(likelihood)
    chosen = [folds != fold for fold in range(FOLDS)] + [np.ones(len(folds), bool)]
    return [
        mixture_weights(likelihood[:, some], FLOOR / clients, min(1.0, CAP / clients))
        if some.any()
        else np.full(clients, 1 / clients)
        for some in chosen
    ]


def _within(target: Array, floor: float, cap: float) -> Array:
    """The weights of sum 1 within bounds that maximise ``sum target log w``: ``target``, scaled and cut."""
    low, high = 0.0, 1.0 / floor
    for _ in range(60):
        scale = (low + high) / 2
        if np.clip(scale * target, floor, cap).sum() < 1:
            low = scale
        else:
            high = scale
    w = np.clip(high * target, floor, cap)
    return np.asarray(w / w.sum(), np.float64)
