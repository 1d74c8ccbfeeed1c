"""The distance rules as they read on paper, on the clients' inner products, in float64."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 21
"""Values worked on at once."""

SMOOTHING = 1e-3
"""Smoothing of Weiszfeld's distances, as a share of the radius that holds a majority."""

KINK_MARGIN = 1e-5
"""Margin by which a client must be the minimum to be taken without iterating."""


def geometric_median(xs: Sequence[Tensor], per_row: bool, tolerance: float, max_iterations: int) -> Tensor:
    """Weighted mean by Weiszfeld's weights, of each row or of the whole."""
    return _combined(xs, _weiszfeld(*_gram(xs, per_row), tolerance, max_iterations))


def krum(xs: Sequence[Tensor], byzantine: int, keep: int) -> Tensor:
    """Mean of the ``keep`` clients of least score, of equal ones the first."""
    squares, lost = _squared_distances(*_gram(xs, per_row=False))
    others = squares[0] + torch.zeros_like(squares[0]).fill_diagonal_(math.inf)
    scores = others.sort(-1).values[:, : len(xs) - byzantine - 2].sum(-1)
    best = _in_order(lost[0], scores)[:keep]
    return _combined(xs, _equal(best, len(xs)))


def nearest_neighbour_mixing(xs: Sequence[Tensor], byzantine: int) -> list[Tensor]:
    """For each client the mean of its nearest, itself the first of them."""
    squares, lost = _squared_distances(*_gram(xs, per_row=False))
    itself_first = squares[0] - torch.eye(len(xs), dtype=squares.dtype, device=squares.device)
    nearest = [_in_order(lost[0], row)[: len(xs) - byzantine] for row in itself_first]
    return [_combined(xs, _equal(chosen, len(xs))) for chosen in nearest]


def _gram(xs: Sequence[Tensor], per_row: bool) -> tuple[Tensor, Tensor]:
    """Inner products ``[G, C, C]`` of the clients' centred rows, and who is infinitely far, ``[G, C]``.

    They are about the coordinate-wise median: an origin near most clients, so that a far one does not take
    the digits of the others.
    """
    rows = [_rows(x) for x in xs]
    n, v = rows[0].shape
    whole = rows[0].new_zeros((n if per_row else 1, len(xs), len(xs)), dtype=torch.float64)
    step = max(1, CHUNK // max(1, len(xs) * v))
    for start in range(0, n, step):
        part = slice(start, start + step)
        values = torch.stack([row[part].double() for row in rows])  # [C, n, V]
        values = values - values.mean(-1, keepdim=True)  # of NaN or infinity: NaN
        values = values - values.nanmedian(0).values
        products = torch.einsum("inv,jnv->nij", values, values)
        if per_row:
            whole[part] = products
        else:
            whole += products.sum(0)
    reach = torch.finfo(torch.float64 if xs[0].dtype == torch.float64 else torch.float32).max
    lost = ~(whole.diagonal(dim1=1, dim2=2) <= reach)
    return whole.masked_fill(lost[:, :, None] | lost[:, None, :], 0), lost


def _rows(x: Tensor) -> Tensor:
    return x.reshape(1, -1) if x.dim() < 2 else x.flatten(0, -2)


def _squared_distances(gram: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    norms = gram.diagonal(dim1=1, dim2=2)
    squares = (norms[:, :, None] + norms[:, None, :] - 2 * gram).clamp_min(0)
    return squares.masked_fill(lost[:, :, None] | lost[:, None, :], math.inf), lost


def _in_order(lost: Tensor, keys: Tensor) -> Tensor:
    """Indices by ascending key, of equal keys the first, the lost last."""
    by_key = keys.argsort(stable=True)
    return by_key[lost[by_key].to(torch.uint8).argsort(stable=True)]


def _equal(chosen: Tensor, count: int) -> Tensor:
    weights = torch.zeros(1, count, dtype=torch.float64, device=chosen.device)
    return weights.index_fill(1, chosen, 1 / len(chosen))


def _iterated(
    gram: Tensor,
    lost: Tensor,
    weights: Tensor,
    floor: Tensor,
    going: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """Weiszfeld's steps from ``weights [G, C]``, where they are ``going [G, 1]``."""
    for _ in range(max_iterations):
        products = (gram @ weights[..., None])[..., 0]
        to_mean = gram.diagonal(dim1=1, dim2=2) - 2 * products + (weights * products).sum(-1, keepdim=True)
        new = _shares((to_mean.clamp_min(0) + floor).rsqrt(), lost)
        change = (new - weights).abs().amax(-1, keepdim=True)
        weights = torch.where(going, new, weights)
        going = going & (change > tolerance)
        if gram.device.type == "cpu" and not going.any():  # elsewhere looking would be a host sync
            break
    return weights


def _weiszfeld(
    gram: Tensor,
    lost: Tensor,
    tolerance: float,
    max_iterations: int,
    iterated: Callable[..., Tensor] = _iterated,
) -> Tensor:
    """Weights ``[G, C]`` that add up to 1; 0 for the lost, NaN where all are."""
    squares, _ = _squared_distances(gram, lost)
    left = (~lost).sum(-1)
    rank = (left // 2)[:, None, None].expand(*lost.shape, 1)
    radii = squares.sort(-1).values.gather(-1, rank)[..., 0]  # [G, C], squared
    radius = radii.amin(-1, keepdim=True)
    floor = SMOOTHING**2 * radius

    distances = squares.sqrt()
    sums = distances.masked_fill(lost[:, None, :], 0).sum(-1).masked_fill(lost, math.inf)
    middle = sums.argmin(-1)[:, None]  # if any client is the minimum, this one
    to_middle = squares.gather(1, middle[..., None].expand(-1, 1, squares.shape[2]))[:, 0]  # [G, C]
    near = to_middle <= floor
    # The others pull at it with unit vectors; it is the minimum if it outweighs their sum.
    pull = torch.where(near | lost, 0.0, to_middle.rsqrt())
    total, norm = pull.sum(-1), gram.diagonal(dim1=1, dim2=2).gather(1, middle)[:, 0]
    at_middle = gram.gather(1, middle[..., None].expand(-1, 1, gram.shape[2]))[:, 0]
    square = (pull * (gram @ pull[..., None])[..., 0]).sum(-1)
    square = square - 2 * total * (pull * at_middle).sum(-1) + total**2 * norm
    kink = square.clamp_min(0).sqrt() < near.sum(-1) * (1 - KINK_MARGIN)

    weights = _shares(radii.rsqrt(), lost)  # outliers weigh little from the start
    going = ~kink[:, None] & (left > 0)[:, None]
    weights = iterated(gram, lost, weights, floor, going, tolerance, max_iterations)
    weights = torch.where(kink[:, None], _shares(near.double(), lost), weights)
    return weights.masked_fill((left == 0)[:, None], math.nan)


def _shares(weights: Tensor, lost: Tensor) -> Tensor:
    weights = weights.masked_fill(lost, 0)
    return weights / weights.sum(-1, keepdim=True)


def _combined(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted mean by ``weights [N or 1, C]``, rounded once; a client without weight does not show."""
    result = torch.empty_like(xs[0], memory_format=torch.contiguous_format)
    rows, out = [_rows(x) for x in xs], _rows(result)
    n, v = out.shape
    weights = weights.expand(n, -1)
    step = max(1, CHUNK // max(1, v))
    for start in range(0, n, step):
        part = slice(start, start + step)
        mean = torch.zeros(out[part].shape, dtype=torch.float64, device=out.device)
        for row, weight in zip(rows, weights[part, :, None].unbind(1), strict=True):
            mean += torch.where(weight == 0, 0.0, weight * row[part])
        out[part] = mean.to(out.dtype)
    return result
