"""Means over the clients of a block of columns, whose values a network sorts in registers."""

import triton
import triton.language as tl


@triton.constexpr_function
def _stages(count):
    return (count - 1).bit_length()


@triton.constexpr_function
def _partner(count, stage, merge, wire):
    """The higher wire that ``wire`` is compared with in this step, 0 for none."""
    top = 1 << ((count - 1).bit_length() - 1)
    bit = top >> stage
    distance, wanted = (bit, 0) if merge == 0 else ((top >> (merge - 1)) - bit, bit)
    return wire + distance if wire + distance < count and wire & bit == wanted else 0


@triton.jit
def _pairs(NAME: tl.constexpr, a, b):
    """``min`` or ``max`` of two numbers of half precision in a register."""
    TYPE: tl.constexpr = ".bf16x2" if a.dtype == tl.bfloat16 else ".f16x2"
    return tl.inline_asm_elementwise(
        NAME + TYPE + " $0, $1, $2;", "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2
    )


@triton.jit
def loaded(xs, at, inside, C: tl.constexpr, PACKED: tl.constexpr):
    """A tuple of ``C`` blocks; float32 unless they are to be sorted ``PACKED``."""
    v = xs[:0]
    for i in tl.static_range(C):
        x = tl.load(xs[i] + at, mask=inside, other=0.0)
        v = v + (x if PACKED else x.to(tl.float32),)
    return v


@triton.jit
def ordered(v, C: tl.constexpr, NAN: tl.constexpr, PACKED: tl.constexpr):
    """The tuple's ``C`` values at each column in ascending order.

    With ``NAN`` all are NaN where one is; else a NaN becomes what it is compared with.

    Batcher's merge exchange, as in csrc/network.h.  The compiler drops what does not reach an output that
    is used.  ``PACKED`` compares two of half precision at once, for half the registers and instructions; the
    interpreter cannot.
    """
    for stage in tl.static_range(_stages(C)):
        for merge in tl.static_range(stage + 1):
            for i in tl.static_range(C):
                if _partner(C, stage, merge, i):
                    a = v[i]
                    b = v[_partner(C, stage, merge, i)]
                    if PACKED:
                        low = _pairs("min.NaN" if NAN else "min", a, b)
                        high = _pairs("max.NaN" if NAN else "max", a, b)
                    elif NAN:
                        low = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
                        high = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
                    else:
                        low = tl.minimum(a, b)
                        high = tl.maximum(a, b)
                    v = v[:i] + (low,) + v[i + 1 :]
                    v = v[: _partner(C, stage, merge, i)] + (high,) + v[_partner(C, stage, merge, i) + 1 :]
    return v


@triton.jit
def trimmed_mean(
    out, xs, start, end, C: tl.constexpr, TRIM: tl.constexpr, PACKED: tl.constexpr, B: tl.constexpr
):
    """Write the means of columns ``start`` to ``end``, a block a program."""
    at = start + tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < end
    v = ordered(loaded(xs, at, inside, C, PACKED), C, True, PACKED)
    if C - 2 * TRIM == 1:
        mean = v[TRIM]
    else:
        mean = v[TRIM].to(tl.float32)
        for i in tl.static_range(TRIM + 1, C - TRIM):
            mean += v[i].to(tl.float32)
        mean *= 1.0 / (C - 2 * TRIM)
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def mean_around_median(
    out, xs, start, end, C: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, B: tl.constexpr
):
    """Write the means of columns ``start`` to ``end``, a block a program."""
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
