"""Mean of the clients nearest to the coordinate-wise median."""

from collections.abc import Sequence

from torch import Tensor

from feddistill_kernels._backend import named
from feddistill_kernels._check import alike
from feddistill_kernels.around_median._op import around_median

__all__ = ["mean_around_median"]


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
