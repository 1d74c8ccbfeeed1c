"""Rules based on distances between clients: per row, or over whole payloads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from typing_extensions import override

from feddistill.aggregation.rules.means import log_mixture, mixture
from feddistill.aggregation.rules.rule import Memory, Need, Rule
from feddistill.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from feddistill.aggregation.rules.block import Block
    from feddistill.aggregation.rules.rule import Walk
    from feddistill_kernels import TopK

SMOOTHING = 1e-4
"""Smoothing of Weiszfeld's steps: Hellinger distances below it count as this much."""


class GeometricMedian(Rule):
    """``q = m**2 / sum m**2``, where ``m`` is the geometric median of the clients' ``sqrt(p)``, row by row.

    Weiszfeld's steps, smoothed (Pillutla et al., "Robust Aggregation for Federated Learning", IEEE TSP
    2022, algorithm 2). Square roots of distributions lie on one sphere: certainty alone takes no client
    far from the others.
    """

    kind: Literal["geometric_median"] = "geometric_median"
    max_iterations: int = Field(default=64, ge=1)

    @override
    def tolerates(self, clients: int) -> int:
        return (clients - 1) // 2

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "geometric_median", max_iterations=self.max_iterations, k=k)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        assert shares is None, "the geometric median has no weights"
        roots = (block.log_mass(block.x.double()) / 2).exp().transpose(0, 1)  # [n, C, W]
        a = weiszfeld(roots @ roots.mT, self.max_iterations)
        return 2 * mixture(block.x / 2, a.T[:, :, None].to(block.x))


class _ByScore(Rule):
    byzantine: int = Field(default=1, ge=0)
    """Byzantine clients to tolerate; at least ``2 * byzantine + 3`` clients are needed."""

    @override
    def needs(self) -> frozenset[Need]:
        return frozenset({"whole"})

    @override
    def tolerates(self, clients: int) -> int:
        return self.byzantine

    @override
    def check(self, clients: int) -> None:
        if clients < 2 * self.byzantine + 3:
            raise ConfigError(
                f"aggregation.rule.byzantine = {self.byzantine} needs at least {2 * self.byzantine + 3} "
                f"clients, there are {clients}; it can be at most {max(0, (clients - 3) // 2)}"
            )

    @override
    def choose(self, walk: Walk, names: tuple[str, ...], memory: Memory) -> tuple[Tensor | None, Memory]:
        import torch

        from feddistill.aggregation.rules.block import squared_distances

        # In float32: sums in another order must not choose other clients.
        squares = squared_distances(walk()).float().fill_diagonal_(torch.inf)
        count = len(squares)
        scores = squares.sort(-1).values[:, : count - self.byzantine - 2].sum(-1)
        best = scores.argsort(stable=True)[: self._kept(count)]
        return torch.zeros(count).index_fill(0, best, 1.0), memory

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "mean_logits", weights=weights, k=k)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        return log_mixture(block.x, shares)

    def _kept(self, clients: int) -> int:
        raise NotImplementedError


class Krum(_ByScore):
    """The client with the least sum of squared distances to its ``C - byzantine - 2`` nearest clients.

    Distances are between whole payloads of centred log-probabilities. Blanchard et al., "Machine Learning
    with Adversaries", NeurIPS 2017. It prefers tight clusters: attackers that agree are nearer to each other
    than honest specialists are.
    """

    kind: Literal["krum"] = "krum"

    def _kept(self, clients: int) -> int:
        return 1


class MultiKrum(_ByScore):
    """The mean of the logits of the ``keep`` clients with the best Krum scores.

    Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017, section 4.
    """

    kind: Literal["multi_krum"] = "multi_krum"
    keep: int | None = Field(default=None, ge=1)
    """``null`` for all clients but ``byzantine``."""

    @override
    def check(self, clients: int) -> None:
        super().check(clients)
        if self.keep is not None and self.keep > clients - self.byzantine:
            raise ConfigError(
                f"aggregation.rule.keep = {self.keep} exceeds the {clients - self.byzantine} of {clients} "
                f"clients that aggregation.rule.byzantine = {self.byzantine} leaves"
            )

    def _kept(self, clients: int) -> int:
        return clients - self.byzantine if self.keep is None else self.keep


class Cronus(Rule):
    """The mixture of the clients left after twice dropping the outliers along the main direction of variance.

    ``ceil(byzantine / 2)`` clients each time, by the top eigenvector of the Gram matrix of the centred
    probabilities. Chang et al., "Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box
    Knowledge Transfer", 2019, with the filter of Diakonikolas et al., ICML 2017.
    """

    kind: Literal["cronus"] = "cronus"
    byzantine: int = Field(default=1, ge=0)
    """Byzantine clients to tolerate; fewer than half."""

    @override
    def needs(self) -> frozenset[Need]:
        return frozenset({"whole"})

    @override
    def tolerates(self, clients: int) -> int:
        return self.byzantine

    @override
    def check(self, clients: int) -> None:
        if 2 * -(-self.byzantine // 2) >= clients or 2 * self.byzantine >= clients:
            raise ConfigError(
                f"aggregation.rule.byzantine = {self.byzantine} must be fewer than half of the "
                f"{clients} clients"
            )

    @override
    def choose(self, walk: Walk, names: tuple[str, ...], memory: Memory) -> tuple[Tensor | None, Memory]:
        import torch

        from feddistill.aggregation.rules.block import inner_products

        gram: Tensor | None = None
        for block in walk():
            times = block.log_times.double().exp()
            # A column of m ids counts m times.
            points = torch.where(times > 0, block.x.double().exp() * times.sqrt(), 0.0).flatten(1)
            part = inner_products(points)
            gram = part if gram is None else gram + part
        assert gram is not None, "there are rows"
        left = torch.arange(len(gram))
        for _ in range(2):
            rest = gram[left][:, left]
            centred = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
            # Up to a factor, the eigenvector holds the clients' projections on the top direction.
            along = torch.linalg.eigh(centred).eigenvectors[:, -1].abs().float()
            drop = -(-self.byzantine // 2)
            order = along.argsort(stable=True)
            left = left[order[: len(left) - drop].sort().values]
        return torch.zeros(len(gram)).index_fill(0, left, 1.0), memory

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "mean_probs", weights=weights, k=k)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        return mixture(block.x, shares)


def weiszfeld(gram: Tensor, max_iterations: int, tolerance: float = 1e-6) -> Tensor:
    """Shares ``[n, C]`` by which the geometric median mixes ``C`` points, from their Gram matrix."""
    import torch

    a = torch.full_like(gram[..., 0], 1 / gram.shape[-1])
    moving = torch.ones_like(a[..., :1], dtype=torch.bool)
    for _ in range(max_iterations):
        inner = (gram @ a[..., None])[..., 0]
        squared = gram.diagonal(dim1=-2, dim2=-1) - 2 * inner + (a * inner).sum(-1, keepdim=True)
        pull = squared.clamp_min(SMOOTHING**2).rsqrt()
        step = torch.where(moving, pull / pull.sum(-1, keepdim=True), a)
        moving = (step - a).abs().amax(-1, keepdim=True) > tolerance
        a = step
        if not moving.any():
            break
    return a
