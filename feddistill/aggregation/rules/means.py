"""Rules based on the mean of the probabilities or of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from feddistill.aggregation.rules.rule import Need, Rule, WeightKind

if TYPE_CHECKING:
    from torch import Tensor

    from feddistill.aggregation.rules.block import Block
    from feddistill_kernels import TopK


class Weighted(Rule):
    """A rule with weights of the clients."""

    weights: WeightKind = "uniform"
    """The clients' weights: equal (``uniform``); in proportion to their private examples (``size``), or class
    by class to their examples of that class (``class_counts``); by accuracy on labelled proxy texts
    (``validation``); by certainty (``confidence``, which an attacker can fake); by how well they explain the
    true labels (``verified``), or that times class counts (``verified_counts``)."""

    secure_sums: ClassVar[bool] = True

    @override
    def weighting(self) -> WeightKind:
        return self.weights


class MeanProbs(Weighted):
    """``q = sum_k w_k p_k``: the mixture of the clients' distributions.

    ``f`` attackers change it by at most ``f/C`` in total variation (with equal weights).
    """

    kind: Literal["mean_probs"] = "mean_probs"

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "mean_probs", weights=weights, k=k)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        return mixture(block.x, shares)


class MeanLogits(Weighted):
    """``q ~ exp(sum_k w_k log p_k)``: the normalised geometric mean of the clients' distributions.

    A client that is certain that a class is wrong vetoes it, which makes this the weakest mean under label
    skew. ``floor`` bounds the veto: no log-probability counts as less than ``-floor``.
    """

    kind: Literal["mean_logits"] = "mean_logits"
    floor: float = Field(default=21.25, gt=0)
    """Nats; the default is the least log-probability that the byte code of a payload can represent."""

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk([floored(a, self.floor) for a in answers], "mean_logits", weights=weights, k=k)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        return log_mixture(block.x.clamp_min(-self.floor), shares)


class Era(Weighted):
    """``q = softmax(p / temperature)`` of the mixture ``p``: entropy reduction.

    Itahara et al., "Distillation-Based Semi-Supervised Federated Learning", IEEE TMC 2021, equation 8. A
    softmax of probabilities is nearly uniform over many classes, so the rule is for classification only.
    """

    kind: Literal["era"] = "era"
    temperature: float = Field(default=0.1, gt=0)

    of_classes: ClassVar[bool] = True
    unanimous: ClassVar[bool] = False

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        return block.normalised(block.normalised(mixture(block.x, shares)).exp() / self.temperature)


class EnhancedEra(Weighted):
    """``q ~ p**beta`` of the mixture ``p``.

    Azuma et al., "Soft-Label Caching and Sharpening for Communication-Efficient Federated Distillation",
    2025. Unlike ERA, it raises ratios of probabilities to a power, whatever their size.
    """

    kind: Literal["enhanced_era"] = "enhanced_era"
    beta: float = Field(default=1.5, gt=0)

    unanimous: ClassVar[bool] = False

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        return block.normalised(self.beta * block.normalised(mixture(block.x, shares)))


class PriorCorrected(Weighted):
    """``q = sum_k w_k softmax(log p_k - strength * log prior_k)``; ``prior_k``: client k's class shares.

    Removes from each client's answer the bias by its own class frequencies before averaging (logit
    adjustment: Menon et al., ICLR 2021). The priors are its class counts plus one.
    """

    kind: Literal["prior_corrected"] = "prior_corrected"
    weights: WeightKind = "class_counts"
    """As for ``mean_probs``."""
    strength: float = Field(default=0.5, ge=0)
    """0 is ``mean_probs``."""

    of_classes: ClassVar[bool] = True
    unanimous: ClassVar[bool] = False
    secure_sums: ClassVar[bool] = False

    @override
    def needs(self) -> frozenset[Need]:
        return super().needs() | {"class_counts"}

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        if block.priors is None:
            return mixture(block.x, shares)
        corrected = block.x - self.strength * block.priors.log()[:, None, :].to(block.x)
        return mixture(block.normalised(corrected), shares)


def mixture(x: Tensor, shares: Tensor | None) -> Tensor:
    """``log sum_c shares_c exp(x_c)``."""
    if shares is None:
        shares = x.new_full((1, 1, 1), 1.0 / x.shape[0])
    return (x + shares.log()).logsumexp(0)


def floored(answer: TopK, floor: float) -> TopK:
    """The answer with every log-probability, also of ids that are not kept, at least ``-floor``."""
    from feddistill_kernels import TopK

    least = (answer.others().double().log() - floor).to(answer.log_tail.dtype)  # -inf where there are none
    return TopK(
        answer.ids, answer.log_probs.clamp_min(-floor), answer.log_tail.clamp_min(least), answer.vocab_size
    )


def log_mixture(x: Tensor, shares: Tensor | None) -> Tensor:
    """``sum_c shares_c x_c``."""
    from feddistill.aggregation.rules.block import weighted_sum

    return weighted_sum(x, x.new_full((1, 1, 1), 1.0 / x.shape[0]) if shares is None else shares)
