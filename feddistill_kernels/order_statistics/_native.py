"""Trimmed mean and mean around the median through ``_C``: C++ on the CPU, CUDA C++ on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._native import DTYPES, library, missing, on_stream

__all__ = ["around_median", "cannot", "missing", "trimmed"]

MOST_CUDA_CLIENTS = 32
"""csrc/order_statistics.h: kMostRegisters."""


def cannot(device_type: str, clients: int) -> str | None:
    """Why it cannot run this call; ``None`` if it can."""
    if device_type != "cuda" or clients <= MOST_CUDA_CLIENTS:
        return None
    return f"on cuda it takes up to {MOST_CUDA_CLIENTS} clients, got {clients}"


def trimmed(xs: Sequence[Tensor], trim: int) -> Tensor:
    """As in ``_reference``."""
    return _run("trimmed_mean", xs, trim)


def around_median(xs: Sequence[Tensor], keep: int) -> Tensor:
    """As in ``_reference``."""
    return _run("around_median", xs, keep)


def _run(name: str, xs: Sequence[Tensor], number: int) -> Tensor:
    dense = [x.contiguous() for x in xs]
    result = torch.empty_like(dense[0], memory_format=torch.contiguous_format)
    task = [x.data_ptr() for x in dense], result.numel(), DTYPES[result.dtype], number, result.data_ptr()
    if result.device.type == "cpu":
        getattr(library(), f"{name}_cpu")(*task, torch.get_num_threads())
        return result
    with on_stream(result) as stream:
        getattr(library(), f"{name}_cuda")(*task, stream)
    return result
