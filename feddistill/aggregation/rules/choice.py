"""Rules that select clients, or count votes, text by text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from feddistill.aggregation.rules.means import mixture
from feddistill.aggregation.rules.rule import Need, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from feddistill.aggregation.rules.block import Block


class MinCe(Rule):
    """For each labelled text, the client with the least cross-entropy, if it is below the student's.

    Fan et al., "FedMKT: Federated Mutual Knowledge Transfer for Large and Small Language Models", COLING
    2025 (DualMinCE). If no client is better than the student, the teacher is the student's own previous
    answer, so that there is nothing to learn. Texts without a label get the mixture of all clients. There is
    no student to compare with in the first round, nor if stored answers are aggregated again.
    """

    kind: Literal["min_ce"] = "min_ce"

    @override
    def needs(self) -> frozenset[Need]:
        return frozenset({"labels", "student"})

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        import torch

        all_clients = mixture(block.x, shares)
        if block.labels is None:
            return all_clients
        known = block.labels >= 0
        column = block.column(block.labels.clamp_min(0))
        truth = block.x.gather(2, column.expand(len(block.x), -1)[..., None])[..., 0]  # [C, n]
        best = truth.max(0)
        chosen = block.x.gather(0, best.indices[None, :, None].expand(1, *block.x.shape[1:]))[0]
        if block.student is not None:
            own = block.student.gather(1, column[:, None])
            chosen = torch.where(best.values[:, None] > own, chosen, block.student)
        return torch.where(known[:, None], chosen, all_clients)


class Vote(Rule):
    """The share of clients whose first choice a class is; equal first choices split a client's vote.

    Papernot et al., "Semi-supervised Knowledge Transfer for Deep Learning from Private Training Data" (PATE),
    ICLR 2017, without its noise. A client's certainty does not count: an attacker has one vote.
    """

    kind: Literal["vote"] = "vote"

    unanimous: ClassVar[bool] = False
    secure_sums: ClassVar[bool] = True

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        import torch

        x = torch.where(block.log_times > -math.inf, block.x, -math.inf)
        first = torch.where(x == x.amax(-1, keepdim=True), 0.0, -math.inf)
        return mixture(block.normalised(first), shares)


class Selective(Rule):
    """The mixture of the clients that are certain enough of a text; of all clients if none is.

    After Shao et al., "Selective Knowledge Sharing for Privacy-Preserving Federated Distillation without a
    Good Teacher", Nature Communications 2024. Their clients decide by the density of their private data at a
    text. A payload has no such score: here the entropy of the answer must be at most ``threshold`` of the
    largest possible. An attacker can be certain of everything.
    """

    kind: Literal["selective"] = "selective"
    threshold: float = Field(default=0.5, gt=0, le=1)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        import torch

        largest = block.log_times.logsumexp(-1)  # log V, [n or 1]
        mass = block.log_mass(block.x).exp()
        entropy = -torch.where(mass > 0, mass * block.x, 0.0).sum(-1)  # [C, n]
        certain = entropy <= self.threshold * largest
        selected = (certain | ~certain.any(0)).to(block.x)
        return mixture(block.x, (selected / selected.sum(0))[..., None])
