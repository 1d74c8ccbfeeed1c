"""Rules that take order statistics of each coordinate."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from feddistill.aggregation.rules.rule import Rule
from feddistill.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from feddistill.aggregation.rules.block import Block
    from feddistill_kernels import TopK


class Median(Rule):
    """The median of each coordinate; for an even number of clients the mean of the middle two.

    Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, definition 1. Inaccurate if
    clients are specialists: the median follows the majority, which has never seen the class.
    """

    kind: Literal["median"] = "median"

    in_range: ClassVar[bool] = True
    of_codes: ClassVar[bool] = True

    @override
    def tolerates(self, clients: int) -> int:
        return (clients - 1) // 2

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "median", k=k)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        from feddistill_kernels import coordinate_median

        assert shares is None, "the median has no weights"
        return coordinate_median(list(block.x))


class TrimmedMean(Rule):
    """The mean of each coordinate without its ``trim`` largest and ``trim`` smallest values.

    Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, definition 2.
    """

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    trim: int = Field(default=1, ge=0)
    """Values dropped at either end of each coordinate; fewer than half of the clients."""

    in_range: ClassVar[bool] = True
    of_codes: ClassVar[bool] = True

    @override
    def tolerates(self, clients: int) -> int:
        return min(self.trim, (clients - 1) // 2)

    @override
    def check(self, clients: int) -> None:
        if 2 * self.trim >= clients:
            raise ConfigError(
                f"aggregation.rule.trim = {self.trim} discards all {clients} clients; "
                f"it can be at most {(clients - 1) // 2}"
            )

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "trimmed_mean", trim=self.trim, k=k)

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        from feddistill_kernels import trimmed_mean

        assert shares is None, "the trimmed mean has no weights"
        return trimmed_mean(list(block.x), self.trim)


class MeanAroundMedian(Rule):
    """The mean of the ``keep`` values nearest to the median, for each coordinate.

    Xie et al., "Generalized Byzantine-tolerant SGD", 2018, definition 7.
    """

    kind: Literal["mean_around_median"] = "mean_around_median"
    keep: int | None = Field(default=None, ge=1)
    """``null`` for a majority, ``C // 2 + 1``."""

    @override
    def tolerates(self, clients: int) -> int:
        return min((clients - 1) // 2, clients - self._keep(clients))

    @override
    def check(self, clients: int) -> None:
        if self._keep(clients) > clients:
            raise ConfigError(f"aggregation.rule.keep = {self.keep} exceeds the {clients} clients")

    @override
    def combine(self, block: Block, shares: Tensor | None) -> Tensor:
        from feddistill_kernels import mean_around_median

        assert shares is None, "the mean around the median has no weights"
        return mean_around_median(list(block.x), self._keep(len(block.x)))

    @override
    def merge(self, answers: list[TopK], weights: Tensor | None, k: int) -> TopK:
        from feddistill_kernels import aggregate_topk

        return aggregate_topk(answers, "mean_around_median", keep=self._keep(len(answers)), k=k)

    def _keep(self, clients: int) -> int:
        return clients // 2 + 1 if self.keep is None else self.keep
