"""The base class of the rules: what a rule needs, what it guarantees, how it combines answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from feddistill.settings_model import Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from feddistill.aggregation.rules.block import Block
    from feddistill_kernels import TopK

    Walk = Callable[[], Iterator[Block]]
    """Starts a pass over all rows, block by block; may be called several times."""

WeightKind = Literal[
    "uniform", "size", "class_counts", "validation", "confidence", "verified", "verified_counts"
]
Need = Literal["labels", "size", "class_counts", "student", "whole", "memory"]
"""``labels`` of some proxy rows; ``size`` or ``class_counts`` of the clients' private data; the previous
``student``'s answers; ``whole`` payloads before the teacher's first row; ``memory`` of earlier rounds."""

Memory = dict[str, dict[str, float]]
"""By client, the numbers that a rule keeps from round to round."""


class Rule(Setting):
    """A formula that aggregates the clients' answers into one teacher.

    Rules take and return log-probabilities: logits are defined only up to a constant per row, and a
    coordinate-wise median of logits depends on that constant.
    """

    kind: str

    unanimous: ClassVar[bool] = True
    """True if the teacher equals the clients' answers when these are all equal."""
    in_range: ClassVar[bool] = False
    """True if with at most ``tolerates(n)`` Byzantine clients every coordinate, before renormalising, stays
    within the honest clients' range."""
    of_classes: ClassVar[bool] = False
    """True if the rule is for classification only, not for a vocabulary."""
    of_codes: ClassVar[bool] = False
    """True if the rule can be computed on the byte codes of dense answers: then the result is the same to the
    bit on every machine."""
    secure_sums: ClassVar[bool] = False
    """True if the rule, with uniform weights, uses nothing but sums over clients, so that secure aggregation
    could hide each client's numbers."""

    def needs(self) -> frozenset[Need]:
        """The inputs that the rule needs besides the answers."""
        weights: dict[str, frozenset[Need]] = {
            "size": frozenset({"size"}),
            "class_counts": frozenset({"class_counts"}),
            "validation": frozenset({"labels"}),
            "verified": frozenset({"labels"}),
            "verified_counts": frozenset({"labels", "class_counts"}),
        }
        return weights.get(self.weighting(), frozenset())

    def weighting(self) -> WeightKind:
        """The source of the clients' weights."""
        return "uniform"

    def tolerates(self, clients: int) -> int:
        """Byzantine clients out of ``clients`` that may send anything without controlling the result."""
        return 0

    def check(self, clients: int) -> None:
        """Raise ``ConfigError`` if the rule needs more clients."""

    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        """``combine`` on compressed answers by a kernel, for rules that have one.

        Args:
            answers: One per client.
            weights: ``[C]`` or ``[C, n]``, not normalised; ``None`` for equal weights.
            k: Entries per row of the result.
        """
        raise NotImplementedError

    def fit(self, walk: Walk) -> Rule:
        """The rule fitted to the texts with known labels; itself if it has nothing to fit."""
        return self

    def choose(self, walk: Walk, names: tuple[str, ...], memory: Memory) -> tuple[Tensor | None, Memory]:
        """Weights ``[C]`` from a pass over all payloads (``None`` for equal weights), and the new memory.

        Called only if ``needs`` contains ``whole``.
        """
        return None, memory

    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        """Aggregate the clients' rows ``[C, n, W]`` into ``[n, W]``, not renormalised.

        Args:
            block: The rows.
            shares: Broadcast over ``[C, n, W]`` and sum to 1 over clients; ``None`` for equal weights.
        """
        raise NotImplementedError
