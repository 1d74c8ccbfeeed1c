"""A logarithmic pool fitted to the known labels; it inverts attackers that always falsify in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr
from typing_extensions import override

from feddistill.aggregation.rules.means import mixture
from feddistill.aggregation.rules.rule import Memory, Need, Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from feddistill.aggregation.rules.block import Block
    from feddistill.aggregation.rules.rule import Walk

    Array = NDArray[np.float64]

FOLDS = 5
"""Cross-validation folds of the labelled texts, by which the penalty is chosen."""

ENOUGH = 500
"""Labelled texts, evenly spread, that the choice uses at most; the final fit uses all."""

STEPS = 50
"""Newton steps at most; about eight are usual."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The fitted parameters."""

    of_answer: Array
    """``[C]``: ``w``, the factor of a client's log-probabilities."""
    of_choice: Array
    """``[C]``: ``u``, added to a client's first choice; negative if the first choice is seldom right."""
    of_class: Array
    """``[V]``: ``b``, added to each class."""


class Stacked(Rule):
    """``q ~ exp(sum_k w_k (log p_k - strength log prior_k) + u_k [k's first choice] + b)``, fitted to labels.

    A logarithmic pool: ``w``, ``u`` and ``b`` maximise the likelihood of the known labels (multinomial
    logistic regression on the clients' answers: Wolpert, "Stacked Generalization", Neural Networks 1992). An
    attacker that swaps its two best classes, or sends the least likely one, does so on labelled texts too,
    because it cannot know which they are: its first choice gets a negative ``u``, and the rest of its answer
    still counts. A quadratic penalty, whose strength is chosen by cross-validation on the labelled texts,
    pulls ``w`` towards ``1 / C`` and the others towards 0.

    Cost: ``O(M V (2C + V)^2)`` for ``M`` labelled texts, a few dozen times.
    """

    kind: Literal["stacked"] = "stacked"
    strength: float = Field(default=1.0, ge=0)
    """Strength of the correction by class priors, as for ``prior_corrected``."""
    floor: float = Field(default=12.0, gt=0)
    """Nats: no log-probability counts as less than ``-floor``."""
    penalties: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.3, 1.0, 3.0, 10.0, 30.0), min_length=1
    )
    """Strengths of the penalty to choose from."""

    of_classes: ClassVar[bool] = True
    unanimous: ClassVar[bool] = False

    _pool: Pool | None = PrivateAttr(default=None)

    @override
    def needs(self) -> frozenset[Need]:
        return frozenset({"labels", "class_counts", "whole"})

    @override
    def fit(self, walk: Walk) -> Rule:
        answers, choices, truth = [], [], []
        for block in walk():
            if block.labels is None or not (known := block.labels >= 0).any():
                continue
            x, first = self._features(block)
            answers.append(x[:, known].numpy())
            choices.append(first[:, known].numpy())
            truth.append(block.labels[known].numpy())
        if not truth:  # without labels all clients count equally
            return self
        features = _features(np.concatenate(answers, 1), np.concatenate(choices, 1))
        clients = answers[0].shape[0]
        centre = np.zeros(len(features))
        centre[:clients] = 1 / clients
        parameters = _chosen(features, np.concatenate(truth), centre, self.penalties)
        fitted = self.model_copy()
        fitted._pool = Pool(*np.split(parameters, [clients, 2 * clients]))
        return fitted

    @override
    def choose(self, walk: Walk, names: tuple[str, ...], memory: Memory) -> tuple[Tensor | None, Memory]:
        import torch

        # For the report: a client's ``w``, or 0 if it is negative.
        if self._pool is None or not (self._pool.of_answer > 0).any():
            return None, memory
        return torch.from_numpy(self._pool.of_answer.clip(0)), memory

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        import torch

        if self._pool is None:
            return mixture(block.x, None)
        x, first = self._features(block)
        by_client = (torch.from_numpy(w)[:, None, None] for w in (self._pool.of_answer, self._pool.of_choice))
        scores = sum((w * y).sum(0) for w, y in zip(by_client, (x, first), strict=True))
        return block.normalised((scores + torch.from_numpy(self._pool.of_class)).to(block.x))

    def _features(self, block: Block) -> tuple[Tensor, Tensor]:
        """Corrected log-probabilities, and 1 at the first choice: float64 ``[C, n, V]`` each."""
        import torch

        log_probs = block.x.double().clamp_min(-self.floor)
        first = torch.zeros_like(log_probs).scatter_(-1, log_probs.argmax(-1, keepdim=True), 1.0)
        if block.priors is not None:
            log_probs = log_probs - self.strength * block.priors.log()[:, None, :].to(log_probs)
        return log_probs, first


def _features(answers: Array, choices: Array) -> Array:
    """``[2C + V, M, V]``: the feature that each parameter multiplies."""
    _, rows, classes = answers.shape
    of_class = np.broadcast_to(np.eye(classes)[:, None, :], (classes, rows, classes))
    return np.concatenate([answers, choices, of_class])


def _chosen(features: Array, truth: NDArray[np.int64], centre: Array, penalties: tuple[float, ...]) -> Array:
    """The parameters fitted with the penalty that has the least cross-validation loss."""
    spread = slice(None, None, -(-len(truth) // ENOUGH))
    sample, labels = features[:, spread], truth[spread]
    folds = np.arange(len(labels)) % FOLDS
    costs = []
    for penalty in penalties if len(penalties) > 1 and len(labels) >= 2 * FOLDS else ():
        cost = 0.0
        for fold in range(FOLDS):
            kept = folds != fold
            fitted = _fitted(sample[:, kept], labels[kept], centre, penalty)
            cost += _cost(fitted, sample[:, ~kept], labels[~kept])
        costs.append(cost)
    # With too few labels for cross-validation, the strongest.
    best = penalties[int(np.argmin(costs))] if costs else max(penalties)
    return _fitted(features, truth, centre, best)


def _fitted(features: Array, truth: NDArray[np.int64], centre: Array, penalty: float) -> Array:
    """Newton's method on the penalised cross-entropy, which is convex.

    The gradient, which determines the result, is summed in a fixed order; BLAS affects only the path.
    """
    flat = features.reshape(len(features), -1)
    fit, cost = centre, _penalised(centre, features, truth, centre, penalty)
    for _ in range(STEPS):
        p = _probabilities(fit, features)
        mean = np.einsum("pnv,nv->pn", features, p)
        gradient = mean.sum(1) - features[:, np.arange(len(truth)), truth].sum(1)
        gradient += 2 * penalty * (fit - centre)
        curvature = (features * p).reshape(len(fit), -1) @ flat.T - mean @ mean.T
        step = np.linalg.solve(curvature + 2 * penalty * np.eye(len(fit)), gradient)
        size = 1.0
        while (new := _penalised(fit - size * step, features, truth, centre, penalty)) > cost and size > 1e-6:
            size /= 2
        if not new < cost - 1e-12 * max(1.0, abs(cost)):
            break
        fit, cost = fit - size * step, new
    return fit


def _penalised(fit: Array, features: Array, truth: NDArray[np.int64], centre: Array, penalty: float) -> float:
    return _cost(fit, features, truth) + penalty * float(np.square(fit - centre).sum())


def _cost(fit: Array, features: Array, truth: NDArray[np.int64]) -> float:
    return -float(np.log(_probabilities(fit, features)[np.arange(len(truth)), truth].clip(1e-300)).sum())


def _probabilities(fit: Array, features: Array) -> Array:
    scores = np.einsum("p,pnv->nv", fit, features)
    terms = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(terms / terms.sum(1, keepdims=True), np.float64)
