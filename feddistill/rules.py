"""Aggregation rules: what the server makes of many answers to the same public texts.

A rule is a frozen value. Its fields are its settings, in a YAML file or on the command line; calling it
is its formula. Rules take and return log-probabilities: logits are defined only up to a constant per
row, and a coordinate-wise median of logits depends on that constant.

Shapes: ``C`` clients, ``N`` positions, ``V`` classes or vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from feddistill.errors import ConfigError
from feddistill.setting import Setting

if TYPE_CHECKING:
    from torch import Tensor

WeightKind = Literal["uniform", "size", "class_counts"]


class Rule(Setting):
    """How the clients' answers become one teacher."""

    kind: str

    def weighting(self) -> WeightKind:
        """By what the clients' answers are weighted."""
        return "uniform"

    def tolerates(self, clients: int) -> int:
        """How many of ``clients`` may send anything at all without owning the result."""
        return 0

    def check(self, clients: int) -> None:
        """Raise ``ConfigError`` where this rule cannot work with so few clients."""

    def __call__(self, log_probs: list[Tensor], weights: Tensor | None = None) -> Tensor:
        """``C`` tensors ``[N, V]`` of log-probabilities to ``[N, V]``, not yet renormalised.

        ``weights``: ``[C]`` or, one for each client and class, ``[C, V]``; ``None`` for equal ones.
        """
        raise NotImplementedError


class _Mean(Rule):
    weights: WeightKind = "uniform"
    """Who counts how much: everyone alike, by private examples (``size``), or, class by class, by
    private examples of that class (``class_counts``; classification only)."""

    def weighting(self) -> WeightKind:
        """See ``Rule``."""
        return self.weights


class MeanProbs(_Mean):
    """``q = sum_k w_k p_k``: the mixture of the clients' distributions.

    ``f`` liars move it by at most ``f/C`` in total variation (with equal weights).
    """

    kind: Literal["mean_probs"] = "mean_probs"

    def __call__(self, log_probs: list[Tensor], weights: Tensor | None = None) -> Tensor:
        """See ``Rule``."""
        import torch

        stacked = torch.stack(log_probs)  # [C, N, V]
        return (stacked + _log_weights(stacked, weights)).logsumexp(0)


class MeanLogits(_Mean):
    """``q ~ exp(sum_k w_k log p_k)``: the normalised geometric mean, the proposal's formula.

    One client that is sure a class is wrong vetoes it, so under label skew it is the weakest mean.
    """

    kind: Literal["mean_logits"] = "mean_logits"

    def __call__(self, log_probs: list[Tensor], weights: Tensor | None = None) -> Tensor:
        """See ``Rule``."""
        import torch

        stacked = torch.stack(log_probs)
        return (stacked * _log_weights(stacked, weights).exp()).sum(0)


class Median(Rule):
    """The median of each coordinate; an even number of clients averages the middle two.

    Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, definition 1. Robust is not good
    where clients are specialists: the median follows the majority that has never seen the class.
    """

    kind: Literal["median"] = "median"

    def tolerates(self, clients: int) -> int:
        """See ``Rule``."""
        return (clients - 1) // 2

    def __call__(self, log_probs: list[Tensor], weights: Tensor | None = None) -> Tensor:
        """See ``Rule``."""
        from feddistill_kernels import coordinate_median

        assert weights is None, "the median has no weights"
        return coordinate_median(log_probs)


class TrimmedMean(Rule):
    """The mean of each coordinate without its ``trim`` largest and ``trim`` smallest clients.

    Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, definition 2.
    """

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    trim: int = Field(default=1, ge=0)
    """Clients left out at either end of each coordinate; ``2 * trim`` must be below the clients."""

    def tolerates(self, clients: int) -> int:
        """See ``Rule``."""
        return self.trim

    def check(self, clients: int) -> None:
        """See ``Rule``."""
        if 2 * self.trim >= clients:
            raise ConfigError(
                f"aggregation.rule.trim = {self.trim} discards all {clients} clients; "
                f"it can be at most {(clients - 1) // 2}"
            )

    def __call__(self, log_probs: list[Tensor], weights: Tensor | None = None) -> Tensor:
        """See ``Rule``."""
        from feddistill_kernels import trimmed_mean

        assert weights is None, "the trimmed mean has no weights"
        self.check(len(log_probs))
        return trimmed_mean(log_probs, self.trim)


RULES: dict[str, type[Rule]] = {
    "mean_probs": MeanProbs,
    "mean_logits": MeanLogits,
    "median": Median,
    "trimmed_mean": TrimmedMean,
}


def _log_weights(stacked: Tensor, weights: Tensor | None) -> Tensor:
    """Weights ``[C]`` or ``[C, V]``, normalised over clients, as logs that broadcast over ``[C, N, V]``."""
    clients = stacked.shape[0]
    if weights is None:
        return stacked.new_full((1, 1, 1), 1.0 / clients).log()
    shares = weights.to(stacked) / weights.to(stacked).sum(0)
    return (shares[:, None, None] if weights.dim() == 1 else shares[:, None, :]).log()
