"""The same with the loss in Triton."""

from functools import partial
from typing import Any

from torch import Tensor

from feddistill_kernels import _backend
from feddistill_kernels.linear_distillation._reference import chunked

__all__ = ["missing", "rows"]

missing = partial(_backend._missing, "distillation", "triton")


def rows(hidden: Tensor, *rest: Any, **numbers: Any) -> Tensor:
    """As in ``_reference``."""
    return chunked(_backend.load("distillation", "triton", hidden).rows, hidden, *rest, **numbers)
