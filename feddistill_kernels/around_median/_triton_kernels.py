"""The mean around the median of a block of columns."""

import triton
import triton.language as tl

from feddistill_kernels.order_statistics._triton_kernels import loaded, ordered


@triton.jit
def mean_around_median(
    out, xs, start, end, C: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, B: tl.constexpr
):
    """Of columns ``start`` to ``end``, a block a program."""
    at = start + tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < end
    v = ordered(loaded(xs, at, inside, C, PACKED), C, True, PACKED)
    twice_median = v[(C - 1) // 2].to(tl.float32) + v[C // 2].to(tl.float32)
    total = tl.zeros([B], tl.float32)
    # The nearest are neighbours; see _reference.  When their window leaves value i, value i + KEEP takes
    # its place.
    for place in tl.static_range(KEEP):
        x = v[place].to(tl.float32)
        for i in tl.static_range(place, C - KEEP, KEEP):
            new = v[i + KEEP].to(tl.float32)
            x = tl.where(v[i].to(tl.float32) + new < twice_median, new, x)
        total += x
    tl.store(out + at, (total * (1.0 / KEEP)).to(out.dtype.element_ty), mask=inside)
