"""The mean around the median through ``_C``: C++ on the CPU, CUDA C++ on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._native import DTYPES, library, missing, on_stream
from feddistill_kernels.order_statistics._native import cannot

__all__ = ["around_median", "cannot", "missing"]


def around_median(xs: Sequence[Tensor], keep: int) -> Tensor:
    """Mean of the ``keep`` values nearest to the median; NaN where any is NaN."""
    dense = [x.contiguous() for x in xs]
    result = torch.empty_like(dense[0], memory_format=torch.contiguous_format)
    task = [x.data_ptr() for x in dense], result.numel(), DTYPES[result.dtype], keep, result.data_ptr()
    if result.device.type == "cpu":
        library().around_median_cpu(*task, torch.get_num_threads())
        return result
    with on_stream(result) as stream:
        library().around_median_cuda(*task, stream)
    return result
