"""``feddistill::trimmed_mean``: schema, shapes for the compiler.  No arithmetic, no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._backend import load, operator


@operator("feddistill::trimmed_mean", "(Tensor[] xs, int trim, str backend) -> Tensor")
def trimmed(xs: Sequence[Tensor], trim: int, backend: str) -> Tensor:
    """Mean of each coordinate's sorted values without ``trim`` at either end."""
    result: Tensor = load("order_statistics", backend, xs[0], clients=len(xs)).trimmed(xs, trim)
    return result


@trimmed.register_fake
def _(xs: Sequence[Tensor], trim: int, backend: str) -> Tensor:
    return torch.empty_like(xs[0], memory_format=torch.contiguous_format)
