"""``feddistill::geometric_median`` and its like: schemas, shapes for the compiler.  No arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._backend import load, operator


@operator(
    "feddistill::geometric_median",
    "(Tensor[] xs, bool per_row, float tolerance, int max_iterations, str backend) -> Tensor",
)
def geometric_median(
    xs: Sequence[Tensor], per_row: bool, tolerance: float, max_iterations: int, backend: str
) -> Tensor:
    """The weighted mean that is nearest to all, by rows or whole."""
    module = load("distances", backend, xs[0], clients=len(xs))
    result: Tensor = module.geometric_median(xs, per_row, tolerance, max_iterations)
    return result


@geometric_median.register_fake
def _(xs: Sequence[Tensor], per_row: bool, tolerance: float, max_iterations: int, backend: str) -> Tensor:
    return torch.empty_like(xs[0], memory_format=torch.contiguous_format)


@operator("feddistill::krum", "(Tensor[] xs, int byzantine, int keep, str backend) -> Tensor")
def krum(xs: Sequence[Tensor], byzantine: int, keep: int, backend: str) -> Tensor:
    """Mean of the ``keep`` clients of least score."""
    result: Tensor = load("distances", backend, xs[0], clients=len(xs)).krum(xs, byzantine, keep)
    return result


@krum.register_fake
def _(xs: Sequence[Tensor], byzantine: int, keep: int, backend: str) -> Tensor:
    return torch.empty_like(xs[0], memory_format=torch.contiguous_format)


@operator("feddistill::nearest_neighbour_mixing", "(Tensor[] xs, int byzantine, str backend) -> Tensor[]")
def nearest_neighbour_mixing(xs: Sequence[Tensor], byzantine: int, backend: str) -> list[Tensor]:
    """Each client's mean with its nearest."""
    result: list[Tensor] = load("distances", backend, xs[0], clients=len(xs)).nearest_neighbour_mixing(
        xs, byzantine
    )
    return result


@nearest_neighbour_mixing.register_fake
def _(xs: Sequence[Tensor], byzantine: int, backend: str) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
