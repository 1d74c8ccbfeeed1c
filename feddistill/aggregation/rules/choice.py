"""Rules in which clients are chosen, vote or abstain, text by text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from feddistill.aggregation.rules.means import mixture
from feddistill.aggregation.rules.rule import Need, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from feddistill.aggregation.rules.block import Block


class MinCe(Rule):
    """For each labelled text the client of least cross-entropy, if it beats the student.

    Fan et al., "FedMKT: Federated Mutual Knowledge Transfer for Large and Small Language Models", COLING
    2025 (DualMinCE). Where no client beats the student, the teacher is what the student said before: there
    is nothing to learn. A text without a label has the mixture of all clients. In the first round, and where
    stored answers are merged anew, there is no student to beat.
    """

    kind: Literal["min_ce"] = "min_ce"

    def needs(self) -> frozenset[Need]:
        """See ``Rule``."""
        return frozenset({"labels", "student"})

    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        """See ``Rule``."""
        import torch

        everyone = mixture(block.x, shares)
        if block.labels is None:
            return everyone
        known = block.labels >= 0
        at = block.column(block.labels.clamp_min(0))
        truth = block.x.gather(2, at.expand(len(block.x), -1)[..., None])[..., 0]  # [C, n]
        best = truth.max(0)
        chosen = block.x.gather(0, best.indices[None, :, None].expand(1, *block.x.shape[1:]))[0]
        if block.student is not None:
            own = block.student.gather(1, at[:, None])
            chosen = torch.where(best.values[:, None] > own, chosen, block.student)
        return torch.where(known[:, None], chosen, everyone)


class Vote(Rule):
    """``q``: the share of clients whose first choice it is; who has several first choices splits its vote.

    Papernot et al., "Semi-supervised Knowledge Transfer for Deep Learning from Private Training Data" (PATE),
    ICLR 2017, without its noise. How sure a client is tells nothing more: a liar has one vote.
    """

    kind: Literal["vote"] = "vote"

    unanimous: ClassVar[bool] = False

    def secure_sums(self) -> bool:
        """See ``Rule``."""
        return True

    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        """See ``Rule``."""
        import torch

        there = torch.where(block.log_times > -math.inf, block.x, -math.inf)
        first = torch.where(there == there.amax(-1, keepdim=True), 0.0, -math.inf)
        return mixture(block.normalised(first), shares)


class Selective(Rule):
    """The mixture of the clients that are sure enough of a text; of all where nobody is.

    After Shao et al., "Selective Knowledge Sharing for Privacy-Preserving Federated Distillation without a
    Good Teacher", Nature Communications 2024. Their clients abstain by the density of their private data at
    a text; a payload has no such score, so here it is the entropy of the answer, at most ``threshold`` of
    the largest possible. A liar is sure of everything.
    """

    kind: Literal["selective"] = "selective"
    threshold: float = Field(default=0.5, gt=0, le=1)

    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        """See ``Rule``."""
        import torch

        largest = block.log_times.logsumexp(-1)  # log V, [n or 1]
        mass = block.log_mass(block.x).exp()
        entropy = -torch.where(mass > 0, mass * block.x, 0.0).sum(-1)  # [C, n]
        sure = entropy <= self.threshold * largest
        speaks = (sure | ~sure.any(0)).to(block.x)
        return mixture(block.x, (speaks / speaks.sum(0))[..., None])
