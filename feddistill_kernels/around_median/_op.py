"""``feddistill::mean_around_median``: schema, shapes for the compiler.  No arithmetic, no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._backend import load, operator


@operator("feddistill::mean_around_median", "(Tensor[] xs, int keep, str backend) -> Tensor")
def around_median(xs: Sequence[Tensor], keep: int, backend: str) -> Tensor:
    """Mean of each coordinate's ``keep`` values nearest to its median."""
    result: Tensor = load("around_median", backend, xs[0], clients=len(xs)).around_median(xs, keep)
    return result


@around_median.register_fake
def _(xs: Sequence[Tensor], keep: int, backend: str) -> Tensor:
    return torch.empty_like(xs[0], memory_format=torch.contiguous_format)
