"""The distance rules in Triton: one read for the inner products, one for the weighted mean.

What is done on ``C x C`` numbers is done by the reference, on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._native import in_rows
from feddistill_kernels._triton import interpreted, launch, missing, power_of_two, processors
from feddistill_kernels.distances import _triton_kernels as kernels
from feddistill_kernels.distances._reference import (
    _equal,
    _in_order,
    _rows,
    _squared_distances,
    _weiszfeld,
)
from feddistill_kernels.order_statistics._triton import by_columns, cannot

__all__ = ["cannot", "geometric_median", "krum", "missing", "nearest_neighbour_mixing"]

TILE = 8
"""Clients whose products with as many others are summed at once, and results written at once."""
WARPS = 4
COLUMNS = 4
"""Columns of a thread, a vector of 128 bits; twice as many in half precision if the registers suffice."""
MOST_GRAMS = 1024
"""Programs that add up the rows' products."""


def geometric_median(xs: Sequence[Tensor], per_row: bool, tolerance: float, max_iterations: int) -> Tensor:
    """As in ``_reference``."""
    clients = _Clients(xs)
    if not clients.result.numel():
        return clients.result
    gram, lost = clients.gram(per_row)
    weights = _weiszfeld(gram, lost, tolerance, max_iterations, iterated=_iterated)
    return clients.combined(weights, [clients.result])[0]


def krum(xs: Sequence[Tensor], byzantine: int, keep: int) -> Tensor:
    """As in ``_reference``."""
    clients = _Clients(xs)
    if not clients.result.numel():
        return clients.result
    squares, lost = _squared_distances(*clients.gram(per_row=False))
    others = squares[0] + torch.zeros_like(squares[0]).fill_diagonal_(torch.inf)
    scores = others.sort(-1).values[:, : len(xs) - byzantine - 2].sum(-1)
    best = _in_order(lost[0], scores)[:keep]
    return clients.combined(_equal(best, len(xs)), [clients.result])[0]


def nearest_neighbour_mixing(xs: Sequence[Tensor], byzantine: int) -> list[Tensor]:
    """As in ``_reference``."""
    clients = _Clients(xs)
    results = [clients.result, *(torch.empty_like(clients.result) for _ in xs[1:])]
    if not clients.result.numel():
        return results
    squares, lost = _squared_distances(*clients.gram(per_row=False))
    itself_first = squares[0] - torch.eye(len(xs), dtype=squares.dtype, device=squares.device)
    nearest = [_in_order(lost[0], row)[: len(xs) - byzantine] for row in itself_first]
    return clients.combined(torch.cat([_equal(chosen, len(xs)) for chosen in nearest]), results)


class _Clients:
    """Rows where they lie, and memory for a result."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.rows = tuple(in_rows(_rows(x)) for x in xs)
        self.strides = tuple(row.stride(0) for row in self.rows)
        self.count = len(xs)
        self.n, self.width = self.rows[0].shape
        self.result = torch.empty_like(xs[0], memory_format=torch.contiguous_format)

    def gram(self, per_row: bool) -> tuple[Tensor, Tensor]:
        """As ``_gram`` of the reference."""
        count, n = self.count, self.n
        tiles = -(-count // TILE)
        origin = self.result
        if tiles > 1:
            origin = self.result = by_columns(kernels.lower_medians, self.rows).view(self.result.shape)
        packed = origin.element_size() == 2 and tiles == 1 and not interpreted()
        columns = 2 * COLUMNS if packed else COLUMNS
        block = 32 * WARPS * columns
        blocks = -(-self.width // block)
        # A part is worth starting a program for from some blocks on.
        parts = min(-(-blocks // 4), -(-8 * processors(origin) // n))
        span = -(-blocks // parts) * block
        parts = -(-self.width // span)
        partials = origin.new_empty((n, parts, count * (count + 2)), dtype=torch.float32)
        launch(
            kernels.moments,
            (n * parts * (tiles * (tiles + 1) // 2),),
            *(partials, origin, self.rows, self.strides, self.width, span, parts),
            warps=WARPS,
            C=count,
            T=min(count, TILE),
            TILES=tiles,
            PACKED=packed,
            B=block,
            E=1 if interpreted() else columns,  # sums take long to interpret
        )
        each = 1 if per_row else -(-n // MOST_GRAMS)
        whole = origin.new_empty((-(-n // each), count, count), dtype=torch.float64)
        launch(
            kernels.grams,
            (len(whole),),
            *(whole, partials, n, self.width, span, parts, each),
            warps=1,
            C=count,
            P=power_of_two(count),
        )
        if not per_row:
            whole = whole.sum(0, keepdim=True)
        lost = ~(whole.diagonal(dim1=1, dim2=2) <= torch.finfo(torch.float32).max)
        return whole.masked_fill(lost[:, :, None] | lost[:, None, :], 0), lost

    def combined(self, weights: Tensor, results: list[Tensor]) -> list[Tensor]:
        """As ``_combined`` of the reference; of many results ``weights [results, C]`` are for all rows."""
        per_row = len(results) == 1 and len(weights) > 1
        n, width, strides = self.n, self.width, self.strides
        if not per_row and all(row.is_contiguous() for row in self.rows):
            n, width, strides = 1, n * width, (0,) * self.count
        weights = weights.float()
        block = 32 * WARPS * COLUMNS * (2 if self.count <= TILE and self.result.element_size() == 2 else 1)
        blocks = -(-width // block)
        for start in range(0, len(results), TILE):
            some = tuple(results[start : start + TILE])
            launch(
                kernels.combined,
                (n * blocks,),
                *(weights if per_row else weights[start:], some, self.rows, strides, width, blocks),
                self.count if per_row else 0,
                warps=WARPS,
                C=self.count,
                R=len(some),
                B=block,
            )
        return results


def _iterated(
    gram: Tensor,
    lost: Tensor,
    weights: Tensor,
    floor: Tensor,
    going: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    count = lost.shape[1]
    weights = weights.clone(memory_format=torch.contiguous_format)
    launch(
        kernels.weiszfeld,
        (len(weights),),
        *(weights, gram.contiguous(), lost.to(torch.uint8), floor.contiguous(), going.to(torch.uint8)),
        *(tolerance, max_iterations),
        warps=1 if count <= 16 else 4,
        C=count,
        P=power_of_two(count),
    )
    return weights
