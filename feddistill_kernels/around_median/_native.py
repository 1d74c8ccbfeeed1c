"""The mean around the median through ``_C``: C++ on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._native import DTYPES, library
from feddistill_kernels._native import cpu_only as missing

__all__ = ["around_median", "missing"]


def around_median(xs: Sequence[Tensor], keep: int) -> Tensor:
    """Mean of the ``keep`` values nearest to the median; NaN where any is NaN."""
    dense = [x.contiguous() for x in xs]
    result = torch.empty_like(dense[0], memory_format=torch.contiguous_format)
    pointers = [x.data_ptr() for x in dense]
    library().around_median_cpu(
        pointers, result.numel(), DTYPES[result.dtype], keep, result.data_ptr(), torch.get_num_threads()
    )
    return result
