"""The mean around the median in Triton."""

from collections.abc import Sequence

from torch import Tensor

from feddistill_kernels._triton import missing
from feddistill_kernels.around_median import _triton_kernels as kernels
from feddistill_kernels.order_statistics._triton import by_columns, cannot

__all__ = ["around_median", "cannot", "missing"]

MOST_PACKED = 8
"""Clients; what was sorted packed is unpacked to be added, and of many clients does not fit the registers."""


def around_median(xs: Sequence[Tensor], keep: int) -> Tensor:
    """As in ``_reference``."""
    return by_columns(kernels.mean_around_median, xs, most_packed=MOST_PACKED, KEEP=keep)
