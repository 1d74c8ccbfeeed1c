"""The k largest of a row, and the sum of the others.

A sweep reads a row once.  64 bytes side by side are a group; each of 256 lanes keeps the four best groups
that it meets, by their largest entry, with their sums of exponentials, and adds up the others.  The k best
entries are in the k best groups: of any other group, k groups have a better entry.  So those are read again,
and what is not below the least of their maxima is a candidate: few more than k.  Where the k best groups may
not all be there, for more than four fell to one lane (one row of 500 at k = 64), or where too many entries
tie, digits of the k-th largest are counted in further sweeps.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-(1 << 63))  # below any key
_LAST = tl.constexpr((1 << 63) - 1)
_ID = tl.constexpr(0x7FFFFFFF)
_LOW = tl.constexpr(0xFFFFFFFF)
_GROUP = tl.constexpr(0x1FFF)  # bits that no half-precision number needs


@triton.jit
def _ranked(z):
    """Integers in the order of the floats; 0 and -0 are one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _ID)


@triton.jit
def _unranked(rank):
    return (rank ^ ((rank >> 31) & _ID)).to(tl.float32, bitcast=True)


@triton.jit
def key(z, id):
    """int64, larger for a larger ``z``, and for a lower id where those are equal."""
    return (_ranked(z).to(tl.int64) << 32) | (id ^ _ID)


@triton.jit
def _value(key):
    return _unranked((key >> 32).to(tl.int32))


@triton.jit
def _group_key(z, group, NARROW: tl.constexpr):
    """As ``key``; an int32 is enough for what was a half-precision number and one of 8192 groups."""
    return (_ranked(z) & ~_GROUP) | (group ^ _GROUP) if NARROW else key(z, group)


@triton.jit
def _group_value(key, NARROW: tl.constexpr):
    return _unranked(tl.where(key < 0, key | _GROUP, key & ~_GROUP)) if NARROW else _value(key)


@triton.jit
def _finite(top):
    return tl.where(top == -INF, 0.0, top)


@triton.jit
def _power(z, c, top):
    """``exp2(z c - top)``, rounded once: ``top`` is a product ``z c`` that was rounded."""
    return tl.exp2(tl.fma(z, c, -_finite(top)))


@triton.jit
def _scaled(top, total, most):
    """A sum of ``exp2(z c - top)`` as one of ``exp2(z c - most)``, for ``most >= top``."""
    return total * tl.exp2(top - _finite(most))


@triton.jit
def _settle(top, total):
    """The sum of all lanes' sums."""
    most = tl.max(top, 0)
    return most, tl.sum(_scaled(top, total, most), 0)


@triton.jit
def _both(top, total, other_top, other_total):
    most = tl.maximum(top, other_top)
    return most, _scaled(top, total, most) + _scaled(other_top, other_total, most)


@triton.jit
def chosen(keys, k, K: tl.constexpr, ID_ORDER: tl.constexpr):
    """The ``k`` largest keys first in ``K`` lanes, then ``NOTHING``; and the least of them."""
    lane = tl.arange(0, K)
    best = tl.topk(keys, K)
    best = tl.where(lane < k, best, NOTHING)
    least = tl.min(tl.where(lane < k, best, _LAST), 0)
    if ID_ORDER:
        swapped = (((best & _ID) ^ _ID) << 32) | ((best >> 32) & _LOW)
        swapped = tl.sort(tl.where(lane < k, swapped, _LAST))
        best = tl.where(lane < k, (swapped << 32) | ((swapped >> 32) ^ _ID), NOTHING)
    return best, least


@triton.jit
def not_chosen(keys, least, top, total, c):
    """The sum ``top, total`` with those keys that are below ``least``."""
    is_other = (keys < least) & (keys != NOTHING)
    z = tl.where(is_other, _value(keys), -INF)
    most = tl.max(z, 0) * c
    return _both(top, total, most, tl.sum(_power(z, c, most), 0))


@triton.jit
def write(best, top, total, k, c, ids, log_probs, log_tail, K: tl.constexpr):
    """Normalise the ``k`` entries of the keys ``best [K]`` and the others, whose sum is ``top, total``."""
    lane = tl.arange(0, K)
    real = lane < k
    z = tl.where(real, _value(best), -INF)
    most = tl.maximum(tl.max(z, 0) * c, top)
    whole = tl.sum(_power(z, c, most), 0) + _scaled(top, total, most)
    log_whole = tl.log(whole)
    tl.store(ids + lane, ((best & _ID) ^ _ID).to(tl.int32), mask=real)
    tl.store(log_probs + lane, tl.fma(z, c, -_finite(most)) * LN2 - log_whole, mask=real)
    tail = (top - _finite(most)) * LN2 + tl.log(total) - log_whole
    none = (total == 0) & (whole > 0)
    tl.store(log_tail, tl.where(none, -INF, tl.where(whole > 0, tail, float("nan"))))


@triton.jit
def _digits(z, DIGITS: tl.constexpr):
    """The highest ``DIGITS`` bytes of an integer >= 0 in the order of the floats."""
    return (_ranked(z).to(tl.int64) + (1 << 31)) >> (32 - 8 * DIGITS)


@triton.jit
def _kth(row, low, high, k, DIGITS: tl.constexpr, B: tl.constexpr):
    """Digits of the k-th largest entry, and how many of those equal to it are among the ``k`` largest."""
    bins = tl.arange(0, 256)
    found = tl.zeros([], tl.int64)
    wanted = tl.zeros([], tl.int32) + k
    for step in range(DIGITS):
        shift = 8 * (DIGITS - 1 - step)
        counts = tl.zeros([256], tl.int32)
        for start in range(low, high, B):
            cols = start + tl.arange(0, B)
            digits = _digits(tl.load(row + cols, mask=cols < high, other=0.0).to(tl.float32), DIGITS)
            here = (cols < high) & ((digits >> (shift + 8)) == found)
            counts += tl.histogram(((digits >> shift) & 255).to(tl.int32), 256, mask=here)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        is_it = (above < wanted) & (above + counts >= wanted)
        found = found * 256 + tl.sum(tl.where(is_it, bins, 0), 0)
        wanted -= tl.sum(tl.where(is_it, above, 0), 0)
    return found, wanted


@triton.jit
def _collect(row, low, high, k, keys, c, DIGITS: tl.constexpr, B: tl.constexpr):
    """Write the keys of the ``k`` largest entries; return the sum of the others."""
    kth, ties = _kth(row, low, high, k, DIGITS, B)
    taken = tl.zeros([], tl.int32)
    tied = tl.zeros([], tl.int32)
    top = tl.full([B], -INF, tl.float32)
    total = tl.zeros([B], tl.float32)
    for start in range(low, high, B):
        cols = start + tl.arange(0, B)
        z = tl.load(row + cols, mask=cols < high, other=-INF).to(tl.float32)
        digits = _digits(z, DIGITS)
        is_tie = ((cols < high) & (digits == kth)).to(tl.int32)
        first = tied + tl.cumsum(is_tie, 0) <= ties
        take = (cols < high) & ((digits > kth) | ((is_tie > 0) & first))
        at = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(keys + at, key(z, cols), mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
        tied += tl.sum(is_tie, 0)
        z = tl.where(take, -INF, z)
        most = tl.maximum(top, z * c)
        total = _scaled(top, total, most) + _power(z, c, most)
        top = most
    return _settle(top, total)


@triton.jit
def _best_groups(
    row, low, high, c, K: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr
):
    """Keys of the ``K`` best groups, the sum of the others, and whether a lane may have lost one of those."""
    GROUP: tl.constexpr = 4 * WIDTH
    DTYPE: tl.constexpr = tl.int32 if NARROW else tl.int64
    EMPTY: tl.constexpr = -(1 << 31) if NARROW else NOTHING
    lane = tl.arange(0, LANES)
    # Four loads of 16 bytes a thread, which so has a group to itself.
    offsets = (lane * GROUP)[:, None] + tl.arange(0, WIDTH)[None, :]
    empty = tl.full([LANES], EMPTY, DTYPE)
    k1, k2, k3, k4 = empty, empty, empty, empty
    zero = tl.zeros([LANES], tl.float32)
    s1, s2, s3, s4 = zero, zero, zero, zero
    top = tl.full([LANES], -INF, tl.float32)
    total = zero
    for start in range(low, high, LANES * GROUP):
        cols = start + offsets
        za = tl.load(row + cols, mask=cols < high, other=-INF).to(tl.float32)
        zb = tl.load(row + cols + WIDTH, mask=cols + WIDTH < high, other=-INF).to(tl.float32)
        zc = tl.load(row + cols + 2 * WIDTH, mask=cols + 2 * WIDTH < high, other=-INF).to(tl.float32)
        zd = tl.load(row + cols + 3 * WIDTH, mask=cols + 3 * WIDTH < high, other=-INF).to(tl.float32)
        most = tl.max(tl.maximum(tl.maximum(za, zb), tl.maximum(zc, zd)), 1)
        at = (most * c)[:, None]
        s = tl.sum((_power(za, c, at) + _power(zb, c, at)) + (_power(zc, c, at) + _power(zd, c, at)), 1)
        this = _group_key(most, (start - low) // GROUP + lane, NARROW)
        b1, b2, b3, b4 = this > k1, this > k2, this > k3, this > k4
        out = _group_value(tl.where(b4, k4, this), NARROW)
        out = tl.where(b4 & (k4 == EMPTY), -INF, out)
        out_sum = tl.where(b4, s4, s)
        k4, s4 = tl.where(b3, k3, tl.where(b4, this, k4)), tl.where(b3, s3, tl.where(b4, s, s4))
        k3, s3 = tl.where(b2, k2, tl.where(b3, this, k3)), tl.where(b2, s2, tl.where(b3, s, s3))
        k2, s2 = tl.where(b1, k1, tl.where(b2, this, k2)), tl.where(b1, s1, tl.where(b2, s, s2))
        k1, s1 = tl.where(b1, this, k1), tl.where(b1, s, s1)
        top, total = _both(top, total, out * c, out_sum)
    keys = tl.reshape(tl.join(tl.join(k1, k2), tl.join(k3, k4)), [4 * LANES])
    sums = tl.reshape(tl.join(tl.join(s1, s2), tl.join(s3, s4)), [4 * LANES])
    best = tl.topk(keys, K)
    least = tl.min(best, 0)
    lost = tl.max((k4 >= least).to(tl.int32), 0) > 0
    is_other = (keys < least) & (keys != EMPTY)
    other = tl.where(is_other, _group_value(keys, NARROW), -INF) * c
    rest_top, rest = _settle(other, tl.where(is_other, sums, 0.0))
    top, total = _settle(top, total)
    top, total = _both(top, total, rest_top, rest)
    return best, least, top, total, lost


@triton.jit
def _candidates(
    row,
    low,
    high,
    keys,
    c,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Write the keys of what may be among the ``K`` largest; return the sum of the others, and success."""
    GROUP: tl.constexpr = 4 * WIDTH
    best, least, top, total, lost = _best_groups(row, low, high, c, K, LANES, WIDTH, NARROW)
    group = (best & _GROUP) ^ _GROUP if NARROW else ((best & _ID) ^ _ID).to(tl.int32)
    cols = tl.reshape(low + (group * GROUP)[:, None] + tl.arange(0, GROUP)[None, :], [K * GROUP])
    z = tl.load(row + cols, mask=cols < high, other=-INF).to(tl.float32)
    take = (z >= _group_value(least, NARROW)) & (cols < high)
    at = tl.cumsum(take.to(tl.int32), 0) - 1
    count = tl.sum(take.to(tl.int32), 0)
    tl.store(keys + at, key(z, cols), mask=take & (at < SLOTS))
    slot = tl.arange(0, SLOTS)
    tl.store(keys + slot, tl.full([SLOTS], NOTHING, tl.int64), mask=slot >= count)
    z = tl.where(take, -INF, z)
    most = tl.max(z, 0) * c
    top, total = _both(top, total, most, tl.sum(_power(z, c, most), 0))
    return top, total, (lost == 0) & (count <= SLOTS) & (total == total)


@triton.jit
def by_groups(
    logits,
    keys,
    sums,
    vocab,
    span,
    stride,
    c,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Write candidates ``keys [N, S, SLOTS]`` of ``span`` columns, and ``sums [N, S, 2]`` of the others.

    A sum of -1 means that this kernel could not find them.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    low = part * span
    at = row * tl.num_programs(1) + part
    high = tl.minimum(low + span, vocab)
    top, total, good = _candidates(
        logits + row * stride, low, high, keys + at * SLOTS, c, K, SLOTS, LANES, WIDTH, NARROW
    )
    tl.store(sums + at * 2, top)
    tl.store(sums + at * 2 + 1, tl.where(good, total, -1.0))


@triton.jit
def by_digits(
    logits,
    keys,
    sums,
    vocab,
    span,
    k,
    stride,
    c,
    ALL: tl.constexpr,
    SLOTS: tl.constexpr,
    DIGITS: tl.constexpr,
    B: tl.constexpr,
):
    """The same the other way, of ``ALL`` parts or of those that are left."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row * tl.num_programs(1) + part
    left = tl.full([], 1, tl.int1)
    if not ALL:
        left = tl.load(sums + at * 2 + 1) == -1
    if left:
        low = part * span
        high = tl.minimum(low + span, vocab)
        keys += at * SLOTS
        slot = tl.arange(0, SLOTS)
        most = tl.minimum(k, high - low)
        tl.store(keys + slot, tl.full([SLOTS], NOTHING, tl.int64), mask=slot >= most)
        top, total = _collect(logits + row * stride, low, high, most, keys, c, DIGITS, B)
        tl.store(sums + at * 2, top)
        tl.store(sums + at * 2 + 1, total)


@triton.jit
def merged(
    keys,
    sums,
    ids,
    log_probs,
    log_tail,
    k,
    parts,
    slots,
    c,
    ID_ORDER: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    P: tl.constexpr,
):
    """The ``k`` largest of a row from its parts' candidates."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, P)
    mine = tl.load(keys + row * (parts * slots) + lane, mask=lane < parts * slots, other=NOTHING)
    part = tl.arange(0, PARTS)
    at = sums + (row * parts + part) * 2
    top = tl.load(at, mask=part < parts, other=-INF)
    top, total = _settle(top, tl.load(at + 1, mask=part < parts, other=0.0))
    best, least = chosen(mine, k, K, ID_ORDER)
    top, total = not_chosen(mine, least, top, total, c)
    write(best, top, total, k, c, ids + row * k, log_probs + row * k, log_tail + row, K)


@triton.jit
def short(
    logits,
    ids,
    log_probs,
    log_tail,
    vocab,
    k,
    stride,
    c,
    ID_ORDER: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
):
    """The same of a row that fits into registers."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, P)
    z = tl.load(logits + row * stride + cols, mask=cols < vocab, other=-INF).to(tl.float32)
    keys = tl.where(cols < vocab, key(z, cols), NOTHING)
    best, least = chosen(keys, k, K, ID_ORDER)
    nothing, zero = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32)
    top, total = not_chosen(keys, least, nothing, zero, c)
    write(best, top, total, k, c, ids + row * k, log_probs + row * k, log_tail + row, K)
