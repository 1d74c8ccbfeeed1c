"""Coordinate-wise median, trimmed mean and mean around the median over clients that are never stacked."""

from collections.abc import Sequence

from torch import Tensor

from feddistill_kernels._backend import named
from feddistill_kernels._check import alike
from feddistill_kernels.order_statistics._op import around_median, trimmed

__all__ = ["coordinate_median", "mean_around_median", "trimmed_mean"]


def trimmed_mean(xs: Sequence[Tensor], trim: int, *, backend: str | None = None) -> Tensor:
    """Mean over clients of each coordinate, without its ``trim`` smallest and ``trim`` largest.

    With ``x_(1) <= ... <= x_(C)`` the clients' values at a coordinate, in order::

        sum_{i = trim + 1}^{C - trim} x_(i) / (C - 2 trim)

    (Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
    definition 2.)

    Args:
        xs: ``C`` tensors of one shape, dtype (float16, bfloat16, float32 or, reference only, float64) and
            device.  No gradient: a backward pass through the result is refused.
        trim: At either end, ``0 <= 2 trim < C``.
        backend: ``"reference"``, ``"native"`` or ``"triton"``, which takes up to 32 clients; ``None`` takes
            the best for the device.

    Returns:
        A contiguous tensor of that shape and dtype; sums are float32.  NaN where any client has NaN: a
        client that sends NaN must be excluded, not outvoted.  Infinities are ordered like other numbers.

    Raises:
        ValueError: ``xs`` is empty or not alike, or ``trim`` is out of range.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        ``native`` and ``triton``: the result, which does not depend on the number of threads, and a copy of
        each client that is not contiguous.  ``reference``: the same and bounded temporaries.

    Example:
        >>> import torch
        >>> trimmed_mean([torch.tensor([x]) for x in (1.0, 2.0, 4.0, 1e9)], trim=1)
        tensor([3.])
    """
    alike(xs)
    if not 0 <= 2 * trim < len(xs):
        raise ValueError(f"trim must be in [0, {(len(xs) - 1) // 2}] for {len(xs)} clients, got {trim}")
    mean: Tensor = trimmed(list(xs), trim, named(backend))
    return mean


def coordinate_median(xs: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Median over clients of each coordinate; of an even number the mean of the middle two.

    It is the trimmed mean that trims all it can (Yin et al., ICML 2018, definition 1).

    Args:
        xs: ``C`` tensors, as in ``trimmed_mean``.
        backend: As in ``trimmed_mean``.

    Returns:
        As ``trimmed_mean``; NaN where any client has NaN.

    Raises:
        ValueError: ``xs`` is empty or not alike.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        As ``trimmed_mean``.

    Example:
        >>> import torch
        >>> coordinate_median([torch.tensor([x]) for x in (1.0, 2.0, 1e9)])
        tensor([2.])
    """
    return trimmed_mean(xs, max(0, len(xs) - 1) // 2, backend=backend)


def mean_around_median(xs: Sequence[Tensor], keep: int, *, backend: str | None = None) -> Tensor:
    """Mean over the ``keep`` clients whose values are nearest to the median, for each coordinate.

    With ``m`` the median of a coordinate and ``S`` the ``keep`` clients of least ``|x_i - m|``, of equally
    near ones the smaller value first::

        sum_{i in S} x_i / keep

    (Xie et al., "Generalized Byzantine-tolerant SGD", 2018, definition 7.)

    Args:
        xs: ``C`` tensors, as in ``trimmed_mean``.  No gradient.
        keep: In ``[1, C]``.
        backend: As in ``trimmed_mean``.

    Returns:
        A contiguous tensor of that shape and dtype; NaN where any client has NaN.

    Raises:
        ValueError: ``xs`` is empty or not alike, or ``keep`` is out of range.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        As ``trimmed_mean``.

    Example:
        >>> import torch
        >>> mean_around_median([torch.tensor([x]) for x in (1.0, 2.0, 4.0, 1e9)], keep=2)
        tensor([3.])
    """
    alike(xs)
    if not 1 <= keep <= len(xs):
        raise ValueError(f"keep must be in [1, {len(xs)}], the number of clients, got {keep}")
    mean: Tensor = around_median(list(xs), keep, named(backend))
    return mean
