"""Trimmed mean and mean around the median as they read on paper."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Values sorted at once."""


def trimmed(xs: Sequence[Tensor], trim: int) -> Tensor:
    """Mean of the sorted values but for ``trim`` at either end; NaN where any is NaN."""
    return _by_columns(xs, lambda ordered: ordered[trim : len(xs) - trim].mean(0))


def around_median(xs: Sequence[Tensor], keep: int) -> Tensor:
    """Mean of the ``keep`` values nearest to the median; NaN where any is NaN."""

    def mean(ordered: Tensor) -> Tensor:
        # The nearest are neighbours.  Their window moves up while the value it loses is farther from the
        # median than the one it gains: m - x_i > x_(i+keep) - m, here without a difference to round.
        twice_median = ordered[(len(xs) - 1) // 2] + ordered[len(xs) // 2]
        first = (ordered[: len(xs) - keep] + ordered[keep:] < twice_median).sum(0)
        window = first + torch.arange(keep, device=first.device)[:, None]
        return ordered.gather(0, window).mean(0)

    return _by_columns(xs, mean)


def _by_columns(xs: Sequence[Tensor], mean: Callable[[Tensor], Tensor]) -> Tensor:
    """``mean`` of the clients' values in ascending order ``[C, n]``, a chunk of columns at a time."""
    result = torch.empty_like(xs[0], memory_format=torch.contiguous_format)
    flat, columns = result.view(-1), [x.reshape(-1) for x in xs]
    step = max(1, CHUNK // len(xs))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        values = torch.stack([column[part] for column in columns])  # [C, n]
        if values.dtype != torch.float64:
            values = values.float()
        ordered = values.sort(0).values  # NaN last
        flat[part] = torch.where(ordered[-1].isnan(), torch.nan, mean(ordered)).to(flat.dtype)
    return result
