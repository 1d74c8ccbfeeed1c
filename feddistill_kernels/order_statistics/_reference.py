"""The trimmed mean as it reads on paper."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Values sorted at once."""


def trimmed(xs: Sequence[Tensor], trim: int) -> Tensor:
    """Mean of the sorted values but for ``trim`` at either end; NaN where any is NaN."""
    result = torch.empty_like(xs[0], memory_format=torch.contiguous_format)
    flat, columns = result.view(-1), [x.reshape(-1) for x in xs]
    step = max(1, CHUNK // len(xs))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        values = torch.stack([column[part] for column in columns])  # [C, n]
        if values.dtype != torch.float64:
            values = values.float()
        ordered = values.sort(0).values  # NaN last
        mean = ordered[trim : len(xs) - trim].mean(0)
        flat[part] = torch.where(ordered[-1].isnan(), torch.nan, mean).to(flat.dtype)
    return result
