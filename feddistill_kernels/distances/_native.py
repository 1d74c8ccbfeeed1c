"""The distance rules through ``_C``: C++ on the CPU, CUDA C++ on a GPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._native import DTYPES, library, missing, on_stream

__all__ = ["cannot", "geometric_median", "krum", "missing", "nearest_neighbour_mixing"]

MOST_CUDA_CLIENTS = 16
"""csrc/distances.h: kMostCudaClients."""


def cannot(device_type: str, clients: int) -> str | None:
    """Why it cannot run this call; ``None`` if it can."""
    if device_type != "cuda" or clients <= MOST_CUDA_CLIENTS:
        return None
    return f"on cuda it takes up to {MOST_CUDA_CLIENTS} clients, got {clients}"


def geometric_median(xs: Sequence[Tensor], per_row: bool, tolerance: float, max_iterations: int) -> Tensor:
    """Weighted mean by Weiszfeld's weights, of each row or of the whole."""
    result = torch.empty_like(xs[0], memory_format=torch.contiguous_format)
    _run("geometric_median", xs, (per_row, tolerance, max_iterations), result.data_ptr(), per_row)
    return result


def krum(xs: Sequence[Tensor], byzantine: int, keep: int) -> Tensor:
    """Mean of the ``keep`` clients of least score."""
    result = torch.empty_like(xs[0], memory_format=torch.contiguous_format)
    _run("krum", xs, (byzantine, keep), result.data_ptr())
    return result


def nearest_neighbour_mixing(xs: Sequence[Tensor], byzantine: int) -> list[Tensor]:
    """For each client the mean of its nearest."""
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    _run("nearest_neighbour_mixing", xs, (byzantine,), [x.data_ptr() for x in results])
    return results


def _run(
    rule: str, xs: Sequence[Tensor], settings: tuple[float, ...], out: int | list[int], per_row: bool = False
) -> None:
    """Write the rule's result where ``out`` points."""
    if not xs[0].numel():
        return
    device, rows = xs[0].device, _rows(xs)
    clients = _clients(rows)
    if device.type == "cpu":
        getattr(library(), f"{rule}_cpu")(clients, *settings, out, torch.get_num_threads())
        return
    size = library().distances_workspace_cuda(clients, per_row)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    with on_stream(xs[0]) as stream:
        getattr(library(), f"{rule}_cuda")(clients, *settings, out, workspace.data_ptr(), stream)


def _rows(xs: Sequence[Tensor]) -> list[Tensor]:
    """Two-dimensional, with contiguous rows; a copy only of what has none."""
    rows = [x.reshape(1, -1) if x.dim() < 2 else x.flatten(0, -2) for x in xs]
    return [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in rows]


def _clients(rows: Sequence[Tensor]) -> Any:
    """Pointers into ``rows``, which the caller keeps alive."""
    n, v = rows[0].shape
    pointers, strides = [x.data_ptr() for x in rows], [x.stride(0) for x in rows]
    return library().Clients(pointers, strides, n, v, DTYPES[rows[0].dtype])
