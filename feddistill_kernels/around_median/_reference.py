"""The mean around the median as it reads on paper."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Values sorted at once."""


def around_median(xs: Sequence[Tensor], keep: int) -> Tensor:
    """Mean of the ``keep`` values nearest to the median; NaN where any is NaN."""
    result = torch.empty_like(xs[0], memory_format=torch.contiguous_format)
    flat, columns = result.view(-1), [x.reshape(-1) for x in xs]
    step = max(1, CHUNK // len(xs))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        values = torch.stack([column[part] for column in columns])  # [C, n]
        if values.dtype != torch.float64:
            values = values.float()
        ordered = values.sort(0).values  # NaN last
        median = (ordered[(len(xs) - 1) // 2] + ordered[len(xs) // 2]) / 2
        distance = torch.where(ordered == median, 0.0, (ordered - median).abs())  # inf - inf is 0 here
        nearest = distance.sort(dim=0, stable=True).indices[:keep]
        mean = ordered.gather(0, nearest).mean(0)
        flat[part] = torch.where(ordered[-1].isnan(), torch.nan, mean).to(flat.dtype)
    return result
