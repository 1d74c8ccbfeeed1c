"""The trimmed mean through ``_C``: C++ on the CPU, CUDA C++ on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._native import DTYPES, library, missing, on_stream

__all__ = ["cannot", "missing", "trimmed"]

MOST_CUDA_CLIENTS = 32
"""csrc/order_statistics.h: kMostRegisters."""


def cannot(device_type: str, clients: int) -> str | None:
    """Why it cannot do this; ``None`` where it can."""
    if device_type != "cuda" or clients <= MOST_CUDA_CLIENTS:
        return None
    return f"on cuda it takes up to {MOST_CUDA_CLIENTS} clients, got {clients}"


def trimmed(xs: Sequence[Tensor], trim: int) -> Tensor:
    """Mean of the sorted values but for ``trim`` at either end; NaN where any is NaN."""
    dense = [x.contiguous() for x in xs]
    result = torch.empty_like(dense[0], memory_format=torch.contiguous_format)
    task = [x.data_ptr() for x in dense], result.numel(), DTYPES[result.dtype], trim, result.data_ptr()
    if result.device.type == "cpu":
        library().trimmed_mean_cpu(*task, torch.get_num_threads())
        return result
    with on_stream(result) as stream:
        library().trimmed_mean_cuda(*task, stream)
    return result
