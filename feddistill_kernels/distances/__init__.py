"""Robust aggregation by distances between whole clients: geometric median, Krum, mixing of neighbours.

Rows are the last dimension; a 1-D tensor is one row.  For the distances each row is centred first: logits
of different models differ by an arbitrary constant a row.  What is combined are the tensors as they are: of
logits the constant means nothing, but where it does (updates, parameters, rows of one number) these rules do
not hold it against a client, and a large one takes the digits of a half-precision result.  Where clients are
not trusted, give log-probabilities, which have none.  A client whose differences to the others are NaN, or
have squares that float32 cannot hold, is infinitely far from everybody.
"""

from collections.abc import Sequence

from torch import Tensor

from feddistill_kernels._backend import named
from feddistill_kernels._check import alike
from feddistill_kernels.distances import _op

__all__ = ["geometric_median", "krum", "nearest_neighbour_mixing"]


def geometric_median(
    xs: Sequence[Tensor],
    *,
    per_row: bool = True,
    tolerance: float = 1e-6,
    max_iterations: int = 64,
    backend: str | None = None,
) -> Tensor:
    """The point whose distances to the clients have the least sum.

    With ``x_i`` the clients' centred rows::

        argmin_z sum_i |z - x_i|

    by Weiszfeld's iteration ``z = sum_i w_i x_i / sum_i w_i`` with smoothed distances,
    ``w_i = 1 / sqrt(|z - x_i|^2 + (s / 1000)^2)``, where ``s`` is the least radius around a client that holds
    more than half of them, so that outliers do not set the scale.  A client that is the minimum itself is
    found before iterating; clients within ``s / 1000`` of it share its weight.  Fewer than half of the
    clients cannot move the centred result far, wherever they are; its level they can.

    (Weiszfeld, 1937; Pillutla et al., "Robust Aggregation for Federated Learning", IEEE TSP 2022.)

    Args:
        xs: ``C`` tensors of one shape ``[..., V]``, dtype (float16, bfloat16, float32 or, reference only,
            float64) and device.  No gradient: a backward pass through the result is refused.
        per_row: One median for each row, else one for the whole tensor, whose rows are centred all the same.
        tolerance: Stop when no client's share of the weight changes by more.
        max_iterations: Stop then at the latest.
        backend: ``"reference"``, ``"native"`` or ``"triton"``, which takes up to 32 clients; ``None`` takes
            the best for the device.

    Returns:
        A contiguous tensor of that shape and dtype: the weighted mean of ``xs``.  A client that is infinitely
        far in a row (NaN or infinity anywhere in it) has no weight there; NaN where no client is left.

    Raises:
        ValueError: ``xs`` is empty or not alike, ``tolerance`` is negative or ``max_iterations`` is not
            positive.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        ``native``: the result, ``C^2`` numbers for each 64 Ki entries, and a copy of each client whose rows
        are not contiguous.  ``triton``: the same, with a few times ``C^2`` numbers for each row and, where
        rows are few, for each part of one.  ``reference``: the result and float64 temporaries, bounded but
        for a single row of all clients.

    Example:
        >>> import torch
        >>> xs = [torch.tensor(x) for x in ([1.0, -1.0], [2.0, -2.0], [1e6, -1e6])]
        >>> geometric_median(xs)
        tensor([ 2., -2.])
    """
    alike(xs)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be positive, got {max_iterations}")
    median: Tensor = _op.geometric_median(list(xs), per_row, tolerance, max_iterations, named(backend))
    return median


def krum(xs: Sequence[Tensor], byzantine: int, *, keep: int = 1, backend: str | None = None) -> Tensor:
    """The client that has the nearest neighbours, or the mean of the ``keep`` best (multi-Krum).

    The score of a client is the sum of the ``C - byzantine - 2`` smallest squared distances to others; the
    lowest scores win, of equal ones the lowest index.

    (Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS
    2017.)

    Args:
        xs: ``C`` tensors, as in ``geometric_median``.
        byzantine: Clients that may be Byzantine, ``C >= 2 byzantine + 3``.
        keep: In ``[1, C - byzantine]``.
        backend: As in ``geometric_median``.

    Returns:
        A contiguous tensor of that shape and dtype.  A client that is infinitely far is not chosen while
        others are left.

    Raises:
        ValueError: ``xs`` is empty or not alike, or ``byzantine`` or ``keep`` is out of range.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        As ``geometric_median``.

    Example:
        >>> import torch
        >>> krum([torch.tensor([x, 0.0]) for x in (1.0, 3.0, 4.0, 6.0, 1e6)], byzantine=1)
        tensor([3., 0.])
    """
    alike(xs)
    count = len(xs)
    if byzantine < 0 or count < 2 * byzantine + 3:
        raise ValueError(
            f"krum needs byzantine >= 0 and at least 2 * byzantine + 3 clients, "
            f"got byzantine={byzantine} and {count} clients"
        )
    if not 1 <= keep <= count - byzantine:
        raise ValueError(f"keep must be in [1, {count - byzantine}], clients less byzantine ones, got {keep}")
    best: Tensor = _op.krum(list(xs), byzantine, keep, named(backend))
    return best


def nearest_neighbour_mixing(
    xs: Sequence[Tensor], byzantine: int, *, backend: str | None = None
) -> list[Tensor]:
    """Each client replaced by the mean of the ``C - byzantine`` nearest to it, itself included.

    To be followed by another rule, which then holds for clients that differ among each other as well. Of
    equally near clients those of the lowest index are taken.

    (Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023.)

    Args:
        xs: ``C`` tensors, as in ``geometric_median``.
        byzantine: Clients that may be Byzantine, ``0 <= 2 byzantine < C``.
        backend: As in ``geometric_median``.

    Returns:
        ``C`` contiguous tensors of that shape and dtype.  A client that is infinitely far is not mixed in
        while there are ``C - byzantine`` others, and is itself replaced by the mean of the first of those.

    Raises:
        ValueError: ``xs`` is empty or not alike, or ``byzantine`` is out of range.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        The ``C`` results, else as ``geometric_median``.

    Example:
        >>> import torch
        >>> mixed = nearest_neighbour_mixing([torch.tensor([x, 0.0]) for x in (1.0, 3.0, 9.0)], byzantine=1)
        >>> [x[0].item() for x in mixed]
        [2.0, 2.0, 6.0]
    """
    alike(xs)
    if not 0 <= 2 * byzantine < len(xs):
        raise ValueError(
            f"byzantine must be in [0, {(len(xs) - 1) // 2}] for {len(xs)} clients, got {byzantine}"
        )
    mixed: list[Tensor] = _op.nearest_neighbour_mixing(list(xs), byzantine, named(backend))
    return mixed
