"""What every rule is: a frozen value that says what it needs, what it promises, and how it combines."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from feddistill.settings_model import Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from feddistill.aggregation.rules.block import Block
    from feddistill_kernels import TopK

    Walk = Callable[[], Iterator[Block]]
    """A pass over all rows, block by block; as many passes as are asked for."""

WeightKind = Literal[
    "uniform", "size", "class_counts", "validation", "confidence", "verified", "verified_counts"
]
Need = Literal["labels", "size", "class_counts", "student", "whole", "memory"]
"""``labels`` of some proxy rows, private ``size`` or ``class_counts`` of the clients, what the ``student``
said before, the ``whole`` of all payloads before the teacher's first row, ``memory`` of former rounds."""

Memory = dict[str, dict[str, float]]
"""By client, what a rule remembers of it from round to round."""


class Rule(Setting):
    """How the clients' answers become one teacher.

    Rules take and return log-probabilities: logits are defined only up to a constant per row, and a
    coordinate-wise median of logits depends on that constant.
    """

    kind: str

    unanimous: ClassVar[bool] = True
    """Whether clients that agree get back what they said."""
    in_range: ClassVar[bool] = False
    """Whether, of up to ``tolerates`` liars, every coordinate is between what honest clients said of it."""
    of_classes: ClassVar[bool] = False
    """Whether it makes sense for classes alone, not for a vocabulary."""
    of_codes: ClassVar[bool] = False
    """Whether it can be taken on bytes, so that the result is the same to the bit on every machine."""

    def needs(self) -> frozenset[Need]:
        """What it has to be given besides the answers."""
        weights: dict[str, frozenset[Need]] = {
            "size": frozenset({"size"}),
            "class_counts": frozenset({"class_counts"}),
            "validation": frozenset({"labels"}),
            "verified": frozenset({"labels"}),
            "verified_counts": frozenset({"labels", "class_counts"}),
        }
        return weights.get(self.weighting(), frozenset())

    def weighting(self) -> WeightKind:
        """By what the clients' answers are weighted."""
        return "uniform"

    def secure_sums(self) -> bool:
        """Whether it only looks at sums over clients, so that each one's numbers could be hidden."""
        return False

    def tolerates(self, clients: int) -> int:
        """How many of ``clients`` may send anything at all without owning the result."""
        return 0

    def check(self, clients: int) -> None:
        """Raise ``ConfigError`` where this rule cannot work with so few clients."""

    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        """The same as ``combine`` on compressed answers, ``k`` entries a row, where a kernel can do it.

        ``weights``: ``[C]`` or ``[C, n]``, not yet normalised; ``None`` for equal ones.
        """
        raise NotImplementedError

    def fit(self, walk: Walk) -> Rule:
        """This rule with what it learns of the answers to texts whose label is known; itself if nothing."""
        return self

    def choose(self, walk: Walk, names: tuple[str, ...], memory: Memory) -> tuple[Tensor | None, Memory]:
        """Look at all payloads first: weights ``[C]`` of the clients, and what to remember.

        Only where ``needs`` names the ``whole``; else there is nothing to see.
        """
        return None, memory

    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        """``C`` clients' rows ``[C, n, W]`` to ``[n, W]``, not renormalised.

        ``shares``: broadcasts over ``[C, n, W]``, sums to 1 over clients; ``None`` for equal ones.
        """
        raise NotImplementedError
