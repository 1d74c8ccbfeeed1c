"""The mean around the median through ``_C``: C++ on the CPU, CUDA C++ on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._native import DTYPES, library, missing
from feddistill_kernels.order_statistics._native import few_enough

__all__ = ["around_median", "missing"]


def around_median(xs: Sequence[Tensor], keep: int) -> Tensor:
    """Mean of the ``keep`` values nearest to the median; NaN where any is NaN."""
    dense = [x.contiguous() for x in xs]
    result = torch.empty_like(dense[0], memory_format=torch.contiguous_format)
    task = [x.data_ptr() for x in dense], result.numel(), DTYPES[result.dtype], keep, result.data_ptr()
    if result.device.type == "cpu":
        library().around_median_cpu(*task, torch.get_num_threads())
        return result
    few_enough(xs)
    with torch.cuda.device(result.device):
        library().around_median_cuda(*task, torch.cuda.current_stream(result.device).cuda_stream)
    return result
