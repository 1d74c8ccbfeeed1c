"""Trimmed mean and mean around the median in Triton: columns sorted in registers, each value read once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._triton import interpreted, launch, missing
from feddistill_kernels.order_statistics import _triton_kernels as kernels

__all__ = ["MOST_CLIENTS", "around_median", "by_columns", "cannot", "missing", "trimmed"]

MOST_CLIENTS = 32
"""A thread's registers hold a vector of each of up to so many clients."""

MOST_PACKED = 8
"""Clients of the mean around the median: what was sorted packed is unpacked to be added, and values of many
clients do not fit the registers."""

WARPS = 4
REGISTERS = 4
"""Registers of a thread for each client: a vector of 128 bits."""
EVEN = 16
"""Triton reads whole vectors under a mask only if it knows ``end`` to be a multiple of this."""


def trimmed(xs: Sequence[Tensor], trim: int) -> Tensor:
    """As in ``_reference``."""
    return by_columns(kernels.trimmed_mean, xs, TRIM=trim)


def around_median(xs: Sequence[Tensor], keep: int) -> Tensor:
    """As in ``_reference``."""
    return by_columns(kernels.mean_around_median, xs, most_packed=MOST_PACKED, KEEP=keep)


def cannot(device_type: str, clients: int) -> str | None:
    """Why it cannot run this call; ``None`` if it can."""
    return None if clients <= MOST_CLIENTS else f"it takes up to {MOST_CLIENTS} clients, got {clients}"


def by_columns(
    kernel: Any, xs: Sequence[Tensor], *, most_packed: int = MOST_CLIENTS, **constants: int
) -> Tensor:
    """Run ``kernel(out, xs, start, end, ...)`` over all columns, a block a program.

    Half precision is sorted packed up to ``most_packed`` clients.
    """
    dense = tuple(x.contiguous() for x in xs)
    result = torch.empty_like(dense[0], memory_format=torch.contiguous_format)
    packed = result.element_size() == 2 and len(dense) <= most_packed and not interpreted()
    block = 32 * WARPS * REGISTERS * (2 if packed else 1)
    n = result.numel()
    even = n // EVEN * EVEN
    # A launch of their own for the last few keeps all the others in whole vectors.
    for start, end in ((0, even), (even, n)):
        launch(
            kernel,
            (-(-(end - start) // block),),
            *(result, dense, start, end),
            warps=WARPS,
            C=len(dense),
            PACKED=packed,
            B=block,
            **constants,
        )
    return result
