"""The loss of a projection, with each chunk's loss from ``_C``."""

from functools import partial

from feddistill_kernels.distillation import _native
from feddistill_kernels.distillation._native import cannot, missing
from feddistill_kernels.linear_distillation._reference import chunked

__all__ = ["cannot", "missing", "rows"]

rows = partial(chunked, _native.rows)
