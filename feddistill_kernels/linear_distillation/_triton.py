"""The loss of a projection, with each chunk's loss in Triton."""

from functools import partial

from feddistill_kernels._triton import missing
from feddistill_kernels.distillation import _triton
from feddistill_kernels.distillation._triton import cannot
from feddistill_kernels.linear_distillation._reference import chunked

__all__ = ["cannot", "missing", "rows"]

rows = partial(chunked, _triton.rows)
