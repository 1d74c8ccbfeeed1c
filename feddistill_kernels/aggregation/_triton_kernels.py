"""Kernels that write the clients' entries to a table by id, and apply a rule to its columns.

``table [N, W + 1, C]`` holds the clients' log-probabilities of a row's W ids, ascending: those that a client
kept, filled up with the lowest others; and at W those of each id that is not in the table.
"""

import triton
import triton.language as tl

from feddistill_kernels._check import NO_ID
from feddistill_kernels.topk._triton_kernels import INF, NOTHING, chosen, key, not_chosen, write

LOG2E = tl.constexpr(1.4426950408889634)
_LAST = tl.constexpr((1 << 63) - 1)
_LOW = tl.constexpr(0xFFFFFFFF)
_NO_ID = tl.constexpr(NO_ID)


@triton.jit
def spread(
    ids,
    log_probs,
    missing,
    client_of,
    union,
    table,
    entries,
    width,
    C: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
):
    """Make ``union [N, W]`` and ``table`` of the entries ``[N, E]`` and of ``missing [N, C]``."""
    row = tl.program_id(0).to(tl.int64)
    union += row * width
    table += row * (width + 1) * C
    for start in range(0, width, B):
        cols = start + tl.arange(0, B)
        tl.store(union + cols, cols, mask=cols < width)
    for start in range(0, (width + 1) * C, B):
        cells = start + tl.arange(0, B)
        inside = cells < (width + 1) * C
        tl.store(table + cells, tl.load(missing + row * C + cells % C, mask=inside), mask=inside)
    entry = tl.arange(0, P)
    id = tl.load(ids + row * entries + entry, mask=entry < entries, other=_NO_ID)
    keys = tl.sort(tl.where(id != _NO_ID, (id.to(tl.int64) << 32) | entry, _LAST))
    real = keys != _LAST
    id = (keys >> 32).to(tl.int32)
    before = tl.gather(id, tl.maximum(entry - 1, 0), 0)
    first = (real & ((entry == 0) | (id != before))).to(tl.int32)
    filled = tl.maximum(width - tl.sum(first, 0), 0)
    # Ids 0, 1, 2, ... fill up, but for those that a client kept: these are at their own place, or at the end.
    place = tl.minimum(id, tl.cumsum(first, 0) - 1 + filled)
    place = tl.minimum(tl.maximum(place, 0), width - 1)  # whatever the ids are
    entry = (keys & _LOW).to(tl.int32)
    value = tl.load(log_probs + row * entries + entry, mask=real)
    client = tl.load(client_of + entry, mask=real, other=0)
    tl.debug_barrier()  # over what was stored there
    tl.store(union + place, id, mask=real)
    tl.store(table + place * C + client, value, mask=real)


@triton.jit
def _cells(table, start, width, C: tl.constexpr, CP: tl.constexpr, B: tl.constexpr):
    """Addresses of ``B`` columns, which of them are there, and the columns."""
    cols = start + tl.arange(0, B)
    client = tl.arange(0, CP)
    inside = (cols <= width)[:, None] & (client < C)[None, :]
    return table + cols[:, None] * C + client[None, :], inside, cols


@triton.jit
def mix(table, mixing, width, others, C: tl.constexpr, CP: tl.constexpr, B: tl.constexpr):
    """Replace each client by its mean with weights ``mixing [C, C]``, renormalised."""
    row = tl.program_id(0).to(tl.int64)
    table += row * (width + 1) * C
    one = tl.arange(0, CP)
    both = (one < C)[:, None] & (one < C)[None, :]
    share = tl.load(mixing + one[:, None] * C + one[None, :], mask=both, other=0.0)[None, :, :]
    top = tl.full([CP], -INF, tl.float32)
    total = tl.zeros([CP], tl.float32)
    for start in range(0, width + 1, B):
        cells, inside, cols = _cells(table, start, width, C, CP, B)
        x = tl.load(cells, mask=inside, other=0.0)[:, None, :]
        mean = tl.sum(tl.where(share == 0, 0.0, share * x), 2)  # without where, 0 * -inf is NaN
        tl.debug_barrier()  # all have read
        tl.store(cells, mean, mask=inside)
        mass = tl.where(cols == width, others, 1).to(tl.float32)[:, None]
        mean = tl.where(inside & (mass > 0), mean, -INF)
        most = tl.maximum(top, tl.max(mean, 0))
        base = tl.where(most == -INF, 0.0, most)
        total = total * tl.exp(top - base) + tl.sum(mass * tl.exp(mean - base[None, :]), 0)
        top = most
    norm = (top + tl.log(total))[None, :]
    tl.debug_barrier()  # all is written
    for start in range(0, width + 1, B):
        cells, inside, _ = _cells(table, start, width, C, CP, B)
        tl.store(cells, tl.load(cells, mask=inside) - norm, mask=inside)


@triton.jit
def distances(table, result, width, others, C: tl.constexpr, CP: tl.constexpr, B: tl.constexpr):
    """Squared distances ``[N, C, C]`` between a row's centred answers; ``inf`` where ids ruled out differ."""
    row = tl.program_id(0).to(tl.int64)
    table += row * (width + 1) * C
    total = tl.zeros([CP], tl.float32)
    count = tl.zeros([CP], tl.float32)
    for start in range(0, width + 1, B):
        cells, inside, cols = _cells(table, start, width, C, CP, B)
        x = tl.load(cells, mask=inside, other=-INF)
        times = tl.where(cols == width, others, 1).to(tl.float32)[:, None]
        times = tl.where(x == -INF, 0.0, times)
        total += tl.sum(tl.where(times > 0, x * times, 0.0), 0)
        count += tl.sum(times, 0)
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros([CP, CP], tl.float32)
    apart = tl.zeros([CP, CP], tl.int32)
    for start in range(0, width + 1, B):
        cells, inside, cols = _cells(table, start, width, C, CP, B)
        x = tl.load(cells, mask=inside, other=-INF)
        times = tl.where(cols == width, others, 1).to(tl.float32)
        times = tl.where(cols <= width, times, 0.0)[:, None, None]
        allowed = (x != -INF).to(tl.int32)
        centred = tl.where(x == -INF, 0.0, x - mean[None, :])
        gap = centred[:, :, None] - centred[:, None, :]
        squares += tl.sum(tl.where(times > 0, times * gap * gap, 0.0), 0)
        differ = (allowed[:, :, None] != allowed[:, None, :]) & (times > 0)
        apart = tl.maximum(apart, tl.max(differ.to(tl.int32), 0))
    one = tl.arange(0, CP)
    both = (one < C)[:, None] & (one < C)[None, :]
    squares = tl.where((apart > 0) | (squares != squares), INF, squares)
    tl.store(result + row * C * C + one[:, None] * C + one[None, :], squares, mask=both)


@triton.jit
def weiszfeld(
    table,
    shares,
    width,
    others,
    tolerance,
    smoothing,
    max_iterations,
    C: tl.constexpr,
    CP: tl.constexpr,
    B: tl.constexpr,
):
    """Weights ``shares [N, C]`` of the clients' square roots that make their geometric median."""
    row = tl.program_id(0).to(tl.int64)
    table += row * (width + 1) * C
    squares = tl.zeros([CP, CP], tl.float32)
    for start in range(0, width + 1, B):
        cells, inside, cols = _cells(table, start, width, C, CP, B)
        root = tl.exp(0.5 * tl.load(cells, mask=inside, other=-INF))
        times = tl.where(cols == width, others, 1).to(tl.float32)[:, None, None]
        gap = root[:, :, None] - root[:, None, :]
        squares += tl.sum(times * gap * gap, 0)
    squared = squares.to(tl.float64)
    client = tl.arange(0, CP)
    share = tl.where(client < C, 1.0 / C, 0.0).to(tl.float64)
    step = tl.zeros([], tl.int32)
    moving = step == 0
    while moving:
        inner = tl.sum(squared * share[None, :], 1)
        away = inner - 0.5 * tl.sum(share * inner, 0)  # squared, from the mean
        away = tl.where(away < smoothing * smoothing, smoothing * smoothing, away)
        pull = tl.where(client < C, 1.0 / tl.sqrt(away), 0.0)
        pull = pull / tl.sum(pull, 0)
        moved = tl.max(tl.abs(pull - share), 0)
        share = pull
        step += 1
        moving = (moved > tolerance) & (step < max_iterations)
    tl.store(shares + row * C + client, share.to(tl.float32), mask=client < C)


@triton.jit
def combine(
    table,
    shares,
    y,
    width,
    shares_stride,
    shares_step,
    trim,
    keep,
    RULE: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    B: tl.constexpr,
):
    """The rule on each column, ``y [N, W + 1]``; ``shares_step`` is 0 where all rows have the same."""
    row = tl.program_id(0).to(tl.int64)
    table += row * (width + 1) * C
    cells, inside, cols = _cells(table, tl.program_id(1) * B, width, C, CP, B)
    x = tl.load(cells, mask=inside, other=INF)
    client = tl.arange(0, CP)
    if RULE == "mean_logits" or RULE == "mean_probs" or RULE == "geometric_median":
        at = shares + row * shares_step + client * shares_stride
        share = tl.load(at, mask=client < C, other=0.0)[None, :]
        if RULE == "mean_logits":
            result = tl.sum(tl.where(share == 0, 0.0, share * x), 1)  # of weight 0, no veto
        else:
            scale: tl.constexpr = 0.5 if RULE == "geometric_median" else 1.0
            z = tl.where(inside, scale * x + tl.log(share), -INF)
            most = tl.max(z, 1)
            base = tl.where(most == -INF, 0.0, most)
            result = (base + tl.log(tl.sum(tl.exp(z - base[:, None]), 1))) / scale
    else:
        is_nan = tl.max((x != x).to(tl.int32), 1) > 0
        x = tl.sort(x)
        rank = client[None, :]
        if RULE == "trimmed_mean":
            kept = (rank >= trim) & (rank < C - trim)
            result = tl.sum(tl.where(kept, x, 0.0), 1) / (C - 2 * trim)
        else:
            tl.static_assert(RULE == "mean_around_median")
            # As in the reference: the window moves up while the value it loses is the farther one.
            low = tl.sum(tl.where(rank == (C - 1) // 2, x, 0.0), 1)
            twice_median = low + tl.sum(tl.where(rank == C // 2, x, 0.0), 1)
            ahead = tl.broadcast_to(tl.minimum(rank + keep, CP - 1), [B, CP])
            farther = x + tl.gather(x, ahead, 1) < twice_median[:, None]
            first = tl.sum(((rank < C - keep) & farther).to(tl.int32), 1)[:, None]
            kept = (rank >= first) & (rank < first + keep)
            result = tl.sum(tl.where(kept, x, 0.0), 1) / keep
        result = tl.where(is_nan, float("nan"), result)
    tl.store(y + row * (width + 1) + cols, result, mask=cols <= width)


@triton.jit
def finish(
    union,
    y,
    ids,
    log_probs,
    log_tail,
    width,
    others,
    k,
    CUT: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
):
    """Renormalise, and move all but the ``k`` likeliest ids into the tail."""
    row = tl.program_id(0).to(tl.int64)
    y += row * (width + 1)
    lane = tl.arange(0, P)
    real = lane < width
    id = tl.load(union + row * width + lane, mask=real, other=0)
    keys = tl.where(real, key(tl.load(y + lane, mask=real, other=0.0), id), NOTHING)
    total = tl.zeros([], tl.float32) + others
    top = tl.where(total > 0, tl.load(y + width) * LOG2E, -INF)
    c = tl.full([], LOG2E, tl.float32)
    if CUT:
        best, least = chosen(keys, k, K, True)
        top, total = not_chosen(keys, least, top, total, c)
        write(best, top, total, k, c, ids + row * k, log_probs + row * k, log_tail + row, K)
    else:
        write(keys, top, total, k, c, ids + row * k, log_probs + row * k, log_tail + row, P)
