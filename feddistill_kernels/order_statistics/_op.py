"""``feddistill::trimmed_mean`` and ``mean_around_median``: schemas, shapes for the compiler.  No gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._backend import load, operator


@operator("feddistill::trimmed_mean", "(Tensor[] xs, int trim, str backend) -> Tensor")
def trimmed(xs: Sequence[Tensor], trim: int, backend: str) -> Tensor:
    """Mean of each coordinate's sorted values without ``trim`` at either end."""
    result: Tensor = load("order_statistics", backend, xs[0], clients=len(xs)).trimmed(xs, trim)
    return result


@operator("feddistill::mean_around_median", "(Tensor[] xs, int keep, str backend) -> Tensor")
def around_median(xs: Sequence[Tensor], keep: int, backend: str) -> Tensor:
    """Mean of each coordinate's ``keep`` values nearest to its median."""
    result: Tensor = load("order_statistics", backend, xs[0], clients=len(xs)).around_median(xs, keep)
    return result


@trimmed.register_fake
@around_median.register_fake
def _(xs: Sequence[Tensor], number: int, backend: str) -> Tensor:
    return torch.empty_like(xs[0], memory_format=torch.contiguous_format)
