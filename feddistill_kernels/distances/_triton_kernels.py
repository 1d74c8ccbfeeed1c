"""Inner products of the clients' centred rows, Weiszfeld's steps on them, and weighted means.

A program of ``moments`` takes a part of a row.  Its columns are differences to an origin near most clients,
so that a far one does not take the digits of the others, less that of the row's first column and the mean of
the part's first block, so that a level does not.  ``grams`` makes of the parts' sums those about the row's
mean.
"""

import triton
import triton.language as tl

from feddistill_kernels.order_statistics._triton_kernels import loaded, ordered

INF = tl.constexpr(float("inf"))


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < INF, x, 0.0)


@triton.jit
def lower_medians(out, xs, start, end, C: tl.constexpr, PACKED: tl.constexpr, B: tl.constexpr):
    """An origin for more clients than ``moments`` takes at once: of columns ``start`` to ``end``."""
    at = start + tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < end
    v = ordered(loaded(xs, at, inside, C, PACKED), C, False, PACKED)
    tl.store(out + at, _finite(v[(C - 1) // 2].to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows(xs, strides, row, tile, C: tl.constexpr, T: tl.constexpr):
    """Pointers to a row of the ``T`` clients of a tile; beyond the last, to the first tile's."""
    rows = xs[:0]
    for i in tl.static_range(T):
        at = xs[i] + row * strides[i]
        for first in tl.static_range(T, C - i, T):
            at = tl.where(tile * T == first, xs[first + i] + row * strides[first + i], at)
        rows = rows + (at,)
    return rows


@triton.jit
def _origin(left, origin, at, inside, TILES: tl.constexpr, T: tl.constexpr, PACKED: tl.constexpr):
    """The lower median of all clients, which with one tile are ``left``."""
    if TILES == 1:
        return _finite(ordered(left, T, False, PACKED)[(T - 1) // 2].to(tl.float32))
    else:
        return tl.load(origin + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _apart(x, origin):
    """``x - origin`` and what it is rounded by (Knuth's two-sum): no client is so far that another's digits
    are lost in the difference."""
    d = x - origin
    back = d - x
    return d, (x - (d - back)) - (origin + back)


@triton.jit
def _levels(x, origin, inside, T: tl.constexpr):
    """Differences in a row's first column, in which alone ``inside`` is true."""
    levels = x[:0]
    for i in tl.static_range(T):
        levels = levels + (tl.sum(tl.where(inside, x[i].to(tl.float32) - origin, 0.0), 0),)
    return levels


@triton.jit
def _differences(x, origin, levels, shifts, inside, T: tl.constexpr):
    y = x[:0]
    for i in tl.static_range(T):
        d, lost = _apart(x[i].to(tl.float32), origin)
        y = y + (tl.where(inside, ((d - levels[i]) + lost) - shifts[i], 0.0),)
    return y


@triton.jit
def _means(x, origin, levels, inside, count, T: tl.constexpr):
    means = x[:0]
    for i in tl.static_range(T):
        d, lost = _apart(x[i].to(tl.float32), origin)
        means = means + (tl.sum(tl.where(inside, (d - levels[i]) + lost, 0.0), 0) / count,)
    return means


@triton.jit
def _added(sums, y, T: tl.constexpr, B: tl.constexpr, E: tl.constexpr):
    """``sums`` with those of ``y``, of the ``E`` columns of a thread."""
    new = y[:0]
    for i in tl.static_range(T):
        if E == 1:
            new = new + (sums[i] + y[i],)
        else:
            new = new + (sums[i] + tl.sum(tl.reshape(y[i], [B // E, E]), 1),)
    return new


@triton.jit
def _multiplied(
    products, left, right, TILES: tl.constexpr, T: tl.constexpr, B: tl.constexpr, E: tl.constexpr
):
    new = left[:0]
    for i in tl.static_range(T):
        for j in tl.static_range(i if TILES == 1 else 0, T):
            product = left[i] * right[j]
            if E > 1:
                product = tl.sum(tl.reshape(product, [B // E, E]), 1)
            new = new + (products[len(new)] + product,)
    return new


@triton.jit
def _zeros(COUNT: tl.constexpr, like, N: tl.constexpr):
    zeros = like[:0]
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([N], tl.float32),)
    return zeros


@triton.jit
def moments(
    partials,
    origin,
    xs,
    strides,
    width,
    span,
    parts,
    C: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
    B: tl.constexpr,
    E: tl.constexpr,
):
    """Write a part's ``[C, C]`` sums of products, ``[C]`` sums and ``[C]`` shifts for a pair of tiles."""
    PAIRS: tl.constexpr = TILES * (TILES + 1) // 2
    pair = tl.program_id(0) % PAIRS  # those that read the same columns run side by side
    piece = tl.program_id(0) // PAIRS
    row = (piece // parts).to(tl.int64)
    low = (piece % parts).to(tl.int64) * span
    high = tl.minimum(low + span, width)
    left_tile = pair * 0
    for tile in tl.static_range(1, TILES):
        left_tile += (pair >= tile * TILES - tile * (tile - 1) // 2).to(tl.int32)
    right_tile = pair - (left_tile * TILES - left_tile * (left_tile - 1) // 2) + left_tile

    lefts = _rows(xs, strides, row, left_tile, C, T)
    rights = _rows(xs, strides, row, right_tile, C, T)
    origin += row * width
    at = low + tl.arange(0, B)
    inside = at < high
    count = tl.minimum(high - low, B).to(tl.float32)
    # The same in all parts of a row, so that what parts' means differ by is small.
    first = tl.arange(0, B) < 1
    x = loaded(lefts, tl.arange(0, B), first, T, PACKED)
    o = _origin(x, origin, tl.arange(0, B), first, TILES, T, PACKED)
    left_levels = _levels(x, o, first, T)
    right_levels = left_levels
    if TILES > 1:
        right_levels = _levels(loaded(rights, tl.arange(0, B), first, T, PACKED), o, first, T)
    x = loaded(lefts, at, inside, T, PACKED)
    o = _origin(x, origin, at, inside, TILES, T, PACKED)
    left_shifts = _means(x, o, left_levels, inside, count, T)
    right_shifts = left_shifts
    if TILES > 1:
        right_shifts = _means(loaded(rights, at, inside, T, PACKED), o, right_levels, inside, count, T)

    sums = _zeros(T, x, B // E)
    products = _zeros(T * (T + 1) // 2 if TILES == 1 else T * T, x, B // E)
    for start in tl.range(low, high, B, num_stages=3):
        at = start + tl.arange(0, B)
        inside = at < high
        x = loaded(lefts, at, inside, T, PACKED)
        o = _origin(x, origin, at, inside, TILES, T, PACKED)
        left = _differences(x, o, left_levels, left_shifts, inside, T)
        right = left
        if TILES > 1:
            y = loaded(rights, at, inside, T, PACKED)
            right = _differences(y, o, right_levels, right_shifts, inside, T)
        sums = _added(sums, left, T, B, E)
        products = _multiplied(products, left, right, TILES, T, B, E)

    partials += piece.to(tl.int64) * (C * (C + 2))
    for i in tl.static_range(T):
        for j in tl.static_range(i if TILES == 1 else 0, T):
            a = left_tile * T + i
            b = right_tile * T + j
            total = tl.sum(products[(i * (2 * T - i - 1)) // 2 + j if TILES == 1 else i * T + j], 0)
            tl.store(partials + a * C + b, total, mask=(a <= b) & (b < C))
        is_mine = (left_tile == right_tile) & (left_tile * T + i < C)
        tl.store(partials + C * C + left_tile * T + i, tl.sum(sums[i], 0), mask=is_mine)
        tl.store(partials + C * C + C + left_tile * T + i, left_shifts[i], mask=is_mine)


@triton.jit
def grams(out, partials, rows, width, span, parts, each, C: tl.constexpr, P: tl.constexpr):
    """Sum of ``each`` rows' ``[C, C]`` products about their means, in float64."""
    i = tl.arange(0, P)[:, None]
    j = tl.arange(0, P)[None, :]
    both = (i < C) & (j < C)
    at_product = tl.minimum(i, j) * C + tl.maximum(i, j)
    gram = tl.zeros([P, P], tl.float64)
    first = tl.program_id(0).to(tl.int64) * each
    for row in range(first, tl.minimum(first + each, rows)):
        before = tl.zeros([], tl.float64)
        mean_i = tl.zeros([P, 1], tl.float64)
        mean_j = tl.zeros([1, P], tl.float64)
        for part in range(parts):
            at = partials + (row * parts + part) * (C * (C + 2))
            count = tl.minimum(width - before, span)
            sum_i = tl.load(at + C * C + i, mask=i < C, other=0.0).to(tl.float64)
            sum_j = tl.load(at + C * C + j, mask=j < C, other=0.0).to(tl.float64)
            # What the part's mean differs from that of the row so far by: Chan, Golub and LeVeque, 1979.
            change_i = tl.load(at + C * C + C + i, mask=i < C, other=0.0) + sum_i / count - mean_i
            change_j = tl.load(at + C * C + C + j, mask=j < C, other=0.0) + sum_j / count - mean_j
            share = count / (before + count)
            gram += tl.load(at + at_product, mask=both, other=0.0).to(tl.float64) - sum_i * (sum_j / count)
            gram += (before * share) * change_i * change_j
            mean_i += share * change_i
            mean_j += share * change_j
            before += count
    tl.store(out + tl.program_id(0).to(tl.int64) * (C * C) + i * C + j, gram, mask=both)


@triton.jit
def weiszfeld(weights, gram, lost, floor, going, tolerance, max_iterations, C: tl.constexpr, P: tl.constexpr):
    """Weiszfeld's steps on ``weights [G, C]``, in place; see ``_iterated`` of the reference."""
    group = tl.program_id(0).to(tl.int64)
    if tl.load(going + group) != 0:
        i = tl.arange(0, P)
        j = i[:, None]
        both = (i[None, :] < C) & (j < C)
        products = tl.load(gram + group * (C * C) + j * C + i[None, :], mask=both, other=0.0)
        norms = tl.load(gram + group * (C * C) + i * (C + 1), mask=i < C, other=0.0)
        kept = tl.load(lost + group * C + i, mask=i < C, other=1) == 0
        least = tl.load(floor + group)
        w = tl.load(weights + group * C + i, mask=i < C, other=0.0)
        step = 0
        change = tl.full([], INF, tl.float64)
        while (step < max_iterations) & (change > tolerance):
            to_mean = tl.sum(products * w[:, None], 0)
            squares = norms - 2 * to_mean + tl.sum(w * to_mean, 0)
            new = tl.where(kept, 1.0 / tl.sqrt(tl.maximum(squares, 0.0) + least), 0.0)
            new = new / tl.sum(new, 0)
            change = tl.max(tl.abs(new - w), 0)
            w = new
            step += 1
        tl.store(weights + group * C + i, w, mask=i < C)


@triton.jit
def combined(
    weights,
    outs,
    xs,
    strides,
    width,
    blocks,
    weights_stride,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """``R`` weighted means of a block of a row, of what has weight: the rest is not read.

    Differences to the heaviest are added to it, so that equal clients give themselves.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * B + tl.arange(0, B)
    weights += row * weights_stride
    x = xs[:0]
    for i in tl.static_range(C):
        end = 0
        for r in tl.static_range(R):
            end = tl.where(tl.load(weights + r * C + i) == 0, end, width)
        x = x + (tl.load(xs[i] + row * strides[i] + at, mask=at < end, other=0.0),)
    for r in tl.static_range(R):
        most = tl.load(weights + r * C)
        heaviest = 0
        origin = x[0].to(tl.float32)
        for i in tl.static_range(1, C):
            w = tl.load(weights + r * C + i)
            origin = tl.where(w > most, x[i].to(tl.float32), origin)
            heaviest = tl.where(w > most, i, heaviest)
            most = tl.where(w > most, w, most)
        moved = tl.zeros([B], tl.float32)
        for i in tl.static_range(C):
            w = tl.load(weights + r * C + i)
            moved += tl.where((w == 0) | (heaviest == i), 0.0, (x[i].to(tl.float32) - origin) * w)
        mean = tl.where(most == most, origin + moved, float("nan"))
        tl.store(outs[r] + row * width + at, mean.to(outs[r].dtype.element_ty), mask=at < width)
