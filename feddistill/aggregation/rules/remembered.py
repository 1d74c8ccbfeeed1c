"""A rule that remembers, from round to round, who was far from the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

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


class ExpGuard(Rule):
    """The mixture by weights ``w_k ~ w_k**decay * exp(-eta * score_k)``, remembered over rounds.

    ``score_k``: the client's mean total variation from the teacher of ``base``, less the median client's, if
    that is more than 0. Roux et al., "On the Byzantine-Resilience of Distillation-Based Federated Learning",
    ICLR 2025 (ExpGuard). A client that was no farther than the median for ``amnesty`` rounds starts afresh.
    """

    kind: Literal["expguard"] = "expguard"
    base: Base = GeometricMedian()
    eta: float = Field(default=20.0, ge=0)
    """Nats of weight for each unit of total variation."""
    decay: float = Field(default=0.9, ge=0, le=1)
    """1 never forgets, 0 at once."""
    amnesty: int = Field(default=3, ge=1)
    """Rounds in a row."""

    def needs(self) -> frozenset[Need]:
        """See ``Rule``."""
        return frozenset({"whole", "memory"})

    def tolerates(self, clients: int) -> int:
        """See ``Rule``."""
        return self.base.tolerates(clients)

    def check(self, clients: int) -> None:
        """See ``Rule``."""
        self.base.check(clients)

    def choose(self, walk: Walk, names: tuple[str, ...], memory: Memory) -> tuple[Tensor | None, Memory]:
        """See ``Rule``."""
        import numpy as np
        import torch

        chosen, _ = self.base.choose(walk, names, {})
        shares = None if chosen is None else (chosen / chosen.sum())[:, None, None]
        rows, apart = 0, np.zeros(len(names))
        for block in walk():
            mass = block.log_mass(block.x).exp()
            middle = block.log_mass(block.normalised(self.base.combine(block, shares))).exp()
            # Row by row in torch, the rest in NumPy: the same sum for any number of threads.
            apart += 0.5 * (mass - middle).abs().sum(-1).numpy().sum(1, dtype=np.float64)
            rows += mass.shape[1]
        scores = np.maximum(apart / rows - np.median(apart / rows), 0.0)
        kept: Memory = dict(memory)  # of clients that are not here as well
        for name, score in zip(names, scores, strict=True):
            before = memory.get(name, {"log_weight": 0.0, "clean": 0.0})
            clean = before["clean"] + 1.0 if score <= 0 else 0.0
            log_weight = self.decay * before["log_weight"] - self.eta * float(score)
            kept[name] = {"log_weight": 0.0 if clean >= self.amnesty else log_weight, "clean": clean}
        most = max(kept[name]["log_weight"] for name in names)
        return torch.tensor([math.exp(kept[name]["log_weight"] - most) for name in names]), kept

    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        """See ``Rule``."""
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "mean_probs", weights=weights, k=k)

    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        """See ``Rule``."""
        return mixture(block.x, shares)
