"""The trimmed mean through ``_C``: C++ on the CPU, CUDA C++ on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._backend import BackendError
from feddistill_kernels._native import DTYPES, library, missing

__all__ = ["few_enough", "missing", "trimmed"]

MOST_CUDA_CLIENTS = 32
"""csrc/order_statistics.h: kMostRegisters."""


def trimmed(xs: Sequence[Tensor], trim: int) -> Tensor:
    """Mean of the sorted values but for ``trim`` at either end; NaN where any is NaN."""
    dense = [x.contiguous() for x in xs]
    result = torch.empty_like(dense[0], memory_format=torch.contiguous_format)
    task = [x.data_ptr() for x in dense], result.numel(), DTYPES[result.dtype], trim, result.data_ptr()
    if result.device.type == "cpu":
        library().trimmed_mean_cpu(*task, torch.get_num_threads())
        return result
    few_enough(xs)
    with torch.cuda.device(result.device):
        library().trimmed_mean_cuda(*task, torch.cuda.current_stream(result.device).cuda_stream)
    return result


def few_enough(xs: Sequence[Tensor]) -> None:
    """Require no more clients than a thread's registers hold."""
    if len(xs) > MOST_CUDA_CLIENTS:
        raise BackendError(
            f"backend 'native' takes up to {MOST_CUDA_CLIENTS} clients on cuda, got {len(xs)}; "
            "use 'reference'"
        )
