"""The distance rules through ``_C``: C++ on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._native import DTYPES, library
from feddistill_kernels._native import cpu_only as missing

__all__ = ["geometric_median", "krum", "missing", "nearest_neighbour_mixing"]


def geometric_median(xs: Sequence[Tensor], per_row: bool, tolerance: float, max_iterations: int) -> Tensor:
    """Weighted mean by Weiszfeld's weights, of each row or of the whole."""
    rows, result = _rows(xs), torch.empty_like(xs[0], memory_format=torch.contiguous_format)
    if result.numel():
        library().geometric_median_cpu(
            _clients(rows), per_row, tolerance, max_iterations, result.data_ptr(), torch.get_num_threads()
        )
    return result


def krum(xs: Sequence[Tensor], byzantine: int, keep: int) -> Tensor:
    """Mean of the ``keep`` clients of least score."""
    rows, result = _rows(xs), torch.empty_like(xs[0], memory_format=torch.contiguous_format)
    if result.numel():
        threads = torch.get_num_threads()
        library().krum_cpu(_clients(rows), byzantine, keep, result.data_ptr(), threads)
    return result


def nearest_neighbour_mixing(xs: Sequence[Tensor], byzantine: int) -> list[Tensor]:
    """For each client the mean of its nearest."""
    rows, results = _rows(xs), [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    if results[0].numel():
        outs = [x.data_ptr() for x in results]
        library().nearest_neighbour_mixing_cpu(_clients(rows), byzantine, outs, torch.get_num_threads())
    return results


def _rows(xs: Sequence[Tensor]) -> list[Tensor]:
    """Two-dimensional, with contiguous rows; a copy only of what has none."""
    rows = [x.reshape(1, -1) if x.dim() < 2 else x.flatten(0, -2) for x in xs]
    return [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in rows]


def _clients(rows: Sequence[Tensor]) -> Any:
    """Pointers into ``rows``, which the caller keeps alive."""
    n, v = rows[0].shape
    pointers, strides = [x.data_ptr() for x in rows], [x.stride(0) for x in rows]
    return library().Clients(pointers, strides, n, v, DTYPES[rows[0].dtype])
