"""A rule that keeps weights from round to round, lower for clients that were far from the others."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import override

from feddistill.aggregation.rules.distance import Cronus, GeometricMedian, Krum, MultiKrum
from feddistill.aggregation.rules.means import mixture
from feddistill.aggregation.rules.order import MeanAroundMedian, Median, TrimmedMean
from feddistill.aggregation.rules.rule import Memory, Need, Rule
from feddistill.settings_model import named

if TYPE_CHECKING:
    from torch import Tensor

    from feddistill.aggregation.rules.block import Block
    from feddistill.aggregation.rules.rule import Walk
    from feddistill_kernels import TopK

Base = Annotated[
    Median | TrimmedMean | MeanAroundMedian | GeometricMedian | Krum | MultiKrum | Cronus,
    Field(discriminator="kind"),
    BeforeValidator(named),
]


@dataclass(frozen=True, slots=True)
class Standing:
    """An entry of the memory."""

    log_weight: float = 0.0
    clean: float = 0.0
    """Rounds in a row in which the client was no farther from the teacher than the median client."""


class ExpGuard(Rule):
    """The mixture with weights ``w_k ~ w_k**decay * exp(-eta * score_k)``, kept from round to round.

    ``score_k`` is the client's mean total variation from the teacher of ``base``, minus that of the median
    client, and at least 0. Roux et al., "On the Byzantine-Resilience of Distillation-Based Federated
    Learning", ICLR 2025 (ExpGuard). The weight of a client that was no farther than the median for
    ``amnesty`` rounds in a row is reset.
    """

    kind: Literal["expguard"] = "expguard"
    base: Base = GeometricMedian()
    eta: float = Field(default=20.0, ge=0)
    """Nats of weight per unit of total variation."""
    decay: float = Field(default=0.9, ge=0, le=1)
    """Share of a log-weight that is kept in the next round."""
    amnesty: int = Field(default=3, ge=1)
    """Rounds in a row after which the weight is reset."""

    @override
    def needs(self) -> frozenset[Need]:
        return frozenset({"whole", "memory"})

    @override
    def tolerates(self, clients: int) -> int:
        return self.base.tolerates(clients)

    @override
    def check(self, clients: int) -> None:
        self.base.check(clients)

    @override
    def choose(self, walk: Walk, names: tuple[str, ...], memory: Memory) -> tuple[Tensor | None, Memory]:
        import numpy as np
        import torch

        chosen, _ = self.base.choose(walk, names, {})
        shares = None if chosen is None else (chosen / chosen.sum())[:, None, None]
        rows, distance = 0, np.zeros(len(names))
        for block in walk():
            mass = block.log_mass(block.x).exp()
            teacher = block.log_mass(block.normalised(self.base.combine(block, shares))).exp()
            # Row by row in torch, the rest in NumPy: the same sum for any number of threads.
            distance += 0.5 * (mass - teacher).abs().sum(-1).numpy().sum(1, dtype=np.float64)
            rows += mass.shape[1]
        scores = np.maximum(distance / rows - np.median(distance / rows), 0.0)
        standings = []
        for name, score in zip(names, scores, strict=True):
            last = Standing(**memory.get(name, {}))
            clean = last.clean + 1.0 if score <= 0 else 0.0
            log_weight = self.decay * last.log_weight - self.eta * float(score)
            standings.append(Standing(0.0 if clean >= self.amnesty else log_weight, clean))
        # Clients that are absent in this round keep their entries.
        kept: Memory = memory | {n: asdict(s) for n, s in zip(names, standings, strict=True)}
        largest = max(standing.log_weight for standing in standings)
        return torch.tensor([math.exp(s.log_weight - largest) for s in standings]), kept

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "mean_probs", weights=weights, k=k)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        return mixture(block.x, shares)
