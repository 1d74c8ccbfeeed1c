"""A pool that is fitted to the labels that the server has: who lies alike everywhere is turned round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from feddistill.aggregation.rules.means import mixture
from feddistill.aggregation.rules.rule import Memory, Need, Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from feddistill.aggregation.rules.block import Block
    from feddistill.aggregation.rules.rule import Walk

    Array = NDArray[np.float64]

FOLDS = 5
"""Of the labelled texts, by which the penalty is chosen."""

ENOUGH = 500
"""Labelled texts, evenly spread, by which it is chosen; the fit is to all."""

STEPS = 50
"""Of Newton's method, at most; it takes some eight."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What was fitted."""

    of_answer: Array
    """``[C]``, what multiplies a client's log-probabilities."""
    of_choice: Array
    """``[C]``, what its first choice has besides; below 0 for one whose first choice is seldom right."""
    of_class: Array
    """``[V]``, what a class has whoever says it."""


class Stacked(Rule):
    """``q ~ exp(sum_k w_k (log p_k - strength log prior_k) + u_k [k's first choice] + b)``, by the labels.

    A logarithmic pool whose ``w``, ``u`` and ``b`` make the labelled texts' labels likeliest (multinomial
    logistic regression on the clients' answers: Wolpert, "Stacked Generalization", Neural Networks 1992).
    A client that swaps its two best classes, or sends the least likely, does so at labelled texts too, as it
    cannot know which they are: its first choice gets a negative ``u``, and what else it says still counts. A
    quadratic penalty holds ``w`` at ``1 / C`` and the others at 0; how strong it is, folds of the labelled
    texts decide.

    Cost: ``O(M V (2C + V)^2)`` for ``M`` labelled texts, a few dozen times.
    """

    kind: Literal["stacked"] = "stacked"
    strength: float = Field(default=1.0, ge=0)
    """Of the correction by what a client rarely saw; as of ``prior_corrected``."""
    floor: float = Field(default=12.0, gt=0)
    """Nats: no log-probability counts as less than ``-floor``."""
    penalties: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.3, 1.0, 3.0, 10.0, 30.0), min_length=1
    )
    """Those tried."""

    of_classes: ClassVar[bool] = True
    unanimous: ClassVar[bool] = False

    _pool: Pool | None = PrivateAttr(default=None)

    def needs(self) -> frozenset[Need]:
        """See ``Rule``."""
        return frozenset({"labels", "class_counts", "whole"})

    def fit(self, walk: Walk) -> Rule:
        """See ``Rule``; without a label everybody counts alike."""
        answers, choices, truth = [], [], []
        for block in walk():
            if block.labels is None or not (known := block.labels >= 0).any():
                continue
            x, first = self._features(block)
            answers.append(x[:, known].numpy())
            choices.append(first[:, known].numpy())
            truth.append(block.labels[known].numpy())
        if not truth:
            return self
        features = _features(np.concatenate(answers, 1), np.concatenate(choices, 1))
        clients = answers[0].shape[0]
        centre = np.zeros(len(features))
        centre[:clients] = 1 / clients
        found = _chosen(features, np.concatenate(truth), centre, self.penalties)
        fitted = self.model_copy()
        fitted._pool = Pool(found[:clients], found[clients : 2 * clients], found[2 * clients :])
        return fitted

    def choose(self, walk: Walk, names: tuple[str, ...], memory: Memory) -> tuple[Tensor | None, Memory]:
        """For the report: a client's ``w``, or nothing where it is negative."""
        import torch

        if self._pool is None or not (self._pool.of_answer > 0).any():
            return None, memory
        return torch.from_numpy(self._pool.of_answer.clip(0)), memory

    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        """See ``Rule``."""
        import torch

        if self._pool is None:
            return mixture(block.x, None)
        x, first = self._features(block)
        by_client = (torch.from_numpy(w)[:, None, None] for w in (self._pool.of_answer, self._pool.of_choice))
        scores = sum((w * y).sum(0) for w, y in zip(by_client, (x, first), strict=True))
        return block.normalised((scores + torch.from_numpy(self._pool.of_class)).to(block.x))

    def _features(self, block: Block) -> tuple[Tensor, Tensor]:
        """``[C, n, V]`` each, float64: corrected log-probabilities, and 1 at the first choice."""
        import torch

        said = block.x.double().clamp_min(-self.floor)
        first = torch.zeros_like(said).scatter_(-1, said.argmax(-1, keepdim=True), 1.0)
        if block.priors is not None:
            said = said - self.strength * block.priors.log()[:, None, :].to(said)
        return said, first


def _features(answers: Array, choices: Array) -> Array:
    """``[2C + V, M, V]``: what each parameter multiplies."""
    _, rows, classes = answers.shape
    of_class = np.broadcast_to(np.eye(classes)[:, None, :], (classes, rows, classes))
    return np.concatenate([answers, choices, of_class])


def _chosen(features: Array, truth: NDArray[np.int64], centre: Array, penalties: tuple[float, ...]) -> Array:
    """The parameters under the penalty by which folds explain each other's labels best."""
    some = slice(None, None, -(-len(truth) // ENOUGH))
    here, labels = features[:, some], truth[some]
    folds = np.arange(len(labels)) % FOLDS
    costs = []
    for penalty in penalties if len(penalties) > 1 and len(labels) >= 2 * FOLDS else ():
        cost = 0.0
        for fold in range(FOLDS):
            kept = folds != fold
            found = _fitted(here[:, kept], labels[kept], centre, penalty)
            cost += _cost(found, here[:, ~kept], labels[~kept])
        costs.append(cost)
    # Too few labels to choose by: the strongest.
    best = penalties[int(np.argmin(costs))] if costs else max(penalties)
    return _fitted(features, truth, centre, best)


def _fitted(features: Array, truth: NDArray[np.int64], centre: Array, penalty: float) -> Array:
    """Newton's method on the penalised cross-entropy, which is convex.

    What decides where it ends, the gradient, is summed in one order; BLAS only says how it gets there.
    """
    flat = features.reshape(len(features), -1)
    at, cost = centre, _penalised(centre, features, truth, centre, penalty)
    for _ in range(STEPS):
        p = _probabilities(at, features)
        mean = np.einsum("pnv,nv->pn", features, p)
        gradient = mean.sum(1) - features[:, np.arange(len(truth)), truth].sum(1)
        gradient += 2 * penalty * (at - centre)
        curvature = (features * p).reshape(len(at), -1) @ flat.T - mean @ mean.T
        step = np.linalg.solve(curvature + 2 * penalty * np.eye(len(at)), gradient)
        size = 1.0
        while (new := _penalised(at - size * step, features, truth, centre, penalty)) > cost and size > 1e-6:
            size /= 2
        if not new < cost - 1e-12 * max(1.0, abs(cost)):
            break
        at, cost = at - size * step, new
    return at


def _penalised(at: Array, features: Array, truth: NDArray[np.int64], centre: Array, penalty: float) -> float:
    return _cost(at, features, truth) + penalty * float(np.square(at - centre).sum())


def _cost(at: Array, features: Array, truth: NDArray[np.int64]) -> float:
    return -float(np.log(_probabilities(at, features)[np.arange(len(truth)), truth].clip(1e-300)).sum())


def _probabilities(at: Array, features: Array) -> Array:
    scores = np.einsum("p,pnv->nv", at, features)
    terms = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(terms / terms.sum(1, keepdims=True), np.float64)
