"""Sweeps over the columns of a row, and the kernels made of them.

First sweep: the normalisers of student and teacher, online, with a maximum a lane.  Then, for a kind whose
psi does not add to 0, the sums of phi and psi.  Last sweep: the gradient, from the other end, whose columns
are the likeliest to be in the cache still.  Where rows are few, a row is split over programs, and what a
sweep found goes to the next through memory: ``partials [N, S, 8]``.
"""

import triton
import triton.language as tl

from feddistill_kernels._check import NO_ID
from feddistill_kernels.distillation._triton_kinds import INF, LN2, LOG2E, slope

FIELDS = 8
"""Statistics of a part of a row in ``partials``: the constants below are their places."""
_S_MAX = tl.constexpr(0)  # the student's largest logit
_S_SUM = tl.constexpr(1)  # sum of exp((z - max) / T)
_S_ONE = tl.constexpr(2)  # the same at T = 1, for the labels
_T_MAX = tl.constexpr(3)  # the teacher's
_T_SUM = tl.constexpr(4)
_REST = tl.constexpr(5)  # the student's sum over ids that the teacher does not keep
_LABEL = tl.constexpr(6)  # the label's logit
_FIELDS = tl.constexpr(FIELDS)
_NO_ID = tl.constexpr(NO_ID)


@triton.jit
def _rescale(top, new, c):
    """What a sum of ``exp2((z - top) c)`` must be multiplied by if ``new`` replaces ``top``."""
    return tl.exp2((top - tl.where(new == -INF, 0.0, new)) * c)


@triton.jit
def _settle(top, total, c):
    """Maximum and sum of what lanes, or parts, have."""
    most = tl.max(top, 0)
    return most, tl.sum(total * _rescale(top, most, c), 0)


@triton.jit
def _statistics(
    student,
    teacher,
    bits,
    label,
    low,
    high,
    c,
    KD: tl.constexpr,
    DENSE: tl.constexpr,
    CE: tl.constexpr,
    B: tl.constexpr,
):
    """The fields of columns ``low`` to ``high``."""
    nothing = tl.full([B], -INF, tl.float32)
    s_top, t_top, s_label = nothing, nothing, nothing
    zero = tl.zeros([B], tl.float32)
    s_sum, s_one, t_sum, rest = zero, zero, zero, zero
    for start in range(low, high, B):
        cols = start + tl.arange(0, B)
        inside = cols < high
        z = tl.load(student + cols, mask=inside, other=-INF).to(tl.float32)
        new = tl.maximum(s_top, z)
        base = tl.where(new == -INF, 0.0, new)
        if KD:
            e = tl.exp2((z - base) * c)
            old = tl.exp2((s_top - base) * c)
            s_sum = s_sum * old + e
            if not DENSE:
                word = tl.load(bits + cols // 32, mask=inside, other=0)
                rest = rest * old + tl.where((word >> (cols % 32)) & 1 == 0, e, 0.0)
        if CE:
            s_one = s_one * tl.exp2((s_top - base) * LOG2E) + tl.exp2((z - base) * LOG2E)
            s_label = tl.where(cols == label, z, s_label)
        s_top = new
        if KD and DENSE:
            t = tl.load(teacher + cols, mask=inside, other=-INF).to(tl.float32)
            new = tl.maximum(t_top, t)
            base = tl.where(new == -INF, 0.0, new)
            t_sum = t_sum * tl.exp2((t_top - base) * c) + tl.exp2((t - base) * c)
            t_top = new
    most, s_sum = _settle(s_top, s_sum, c)
    s_one = tl.sum(s_one * _rescale(s_top, most, LOG2E), 0)
    rest = tl.sum(rest * _rescale(s_top, most, c), 0)
    t_top, t_sum = _settle(t_top, t_sum, c)
    return most, s_sum, s_one, t_top, t_sum, rest, tl.max(s_label, 0)


@triton.jit
def _combined(partials, parts, c, PARTS: tl.constexpr):
    """The fields of a row from those of its parts."""
    part = tl.arange(0, PARTS)
    inside = part < parts
    at = partials + part * _FIELDS
    s_top = tl.load(at + _S_MAX, mask=inside, other=-INF)
    t_top = tl.load(at + _T_MAX, mask=inside, other=-INF)
    most, s_sum = _settle(s_top, tl.load(at + _S_SUM, mask=inside, other=0.0), c)
    s_one = tl.sum(tl.load(at + _S_ONE, mask=inside, other=0.0) * _rescale(s_top, most, LOG2E), 0)
    rest = tl.sum(tl.load(at + _REST, mask=inside, other=0.0) * _rescale(s_top, most, c), 0)
    t_top, t_sum = _settle(t_top, tl.load(at + _T_SUM, mask=inside, other=0.0), c)
    return most, s_sum, s_one, t_top, t_sum, rest, tl.max(tl.load(at + _LABEL, mask=inside, other=-INF), 0)


@triton.jit
def _pair(z, t, s_top, s_sum, t_top, t_sum, c):
    """``p``, ``q`` and ``d = log(q / p)``."""
    z -= s_top
    t -= t_top
    p = tl.exp2(z * c) * (1.0 / s_sum)
    q = tl.exp2(t * c) * (1.0 / t_sum)
    d = (t - z) * (c * LN2) - (tl.log(t_sum) - tl.log(s_sum))
    return p, q, tl.where((z == -INF) & (t == -INF), 0.0, d)


@triton.jit
def _sums(
    student, teacher, low, high, s_top, s_sum, t_top, t_sum, c, beta, KIND: tl.constexpr, B: tl.constexpr
):
    """Sums of ``phi`` and ``psi`` over columns ``low`` to ``high``."""
    phi_sum = tl.zeros([B], tl.float32)
    psi_sum = tl.zeros([B], tl.float32)
    for start in range(low, high, B):
        cols = start + tl.arange(0, B)
        z = tl.load(student + cols, mask=cols < high, other=-INF).to(tl.float32)
        t = tl.load(teacher + cols, mask=cols < high, other=-INF).to(tl.float32)
        p, q, d = _pair(z, t, s_top, s_sum, t_top, t_sum, c)
        phi, psi = slope(p, q, d, beta, KIND)
        phi_sum += phi
        psi_sum += psi
    return tl.sum(phi_sum, 0), tl.sum(psi_sum, 0)


@triton.jit
def _slopes(
    student,
    teacher,
    gradient,
    label,
    low,
    high,
    vocab,
    s_top,
    s_sum,
    s_one,
    t_top,
    t_sum,
    psi_sum,
    tail_slope,
    kd,
    ce,
    c,
    beta,
    KIND: tl.constexpr,
    KD: tl.constexpr,
    DENSE: tl.constexpr,
    CE: tl.constexpr,
    B: tl.constexpr,
):
    """Write the gradient of columns ``low`` to ``high``, which may reach into the pad.

    Return the sum of phi, of forward KL: other kinds have it from an earlier sweep.

    ``kd`` and ``ce`` are the shares of the slopes in ``student``, the row's scale included.
    """
    phi_sum = tl.zeros([B], tl.float32)
    blocks = tl.cdiv(high - low, B)
    for i in range(blocks):
        cols = low + (blocks - 1 - i) * B + tl.arange(0, B)
        inside = (cols < high) & (cols < vocab)
        z = tl.load(student + cols, mask=inside, other=-INF).to(tl.float32)
        g = tl.zeros([B], tl.float32)
        if KD:
            if DENSE:
                t = tl.load(teacher + cols, mask=inside, other=-INF).to(tl.float32)
                p, q, d = _pair(z, t, s_top, s_sum, t_top, t_sum, c)
                phi, psi = slope(p, q, d, beta, KIND)
                g = kd * (psi - p * psi_sum)
                if KIND == "forward_kl":
                    phi_sum += phi
            else:
                g = kd * (tl.exp2((z - s_top) * c) * (1.0 / s_sum)) * tail_slope
        if CE:
            g += ce * (tl.exp2((z - s_top) * LOG2E) * (1.0 / s_one) - tl.where(cols == label, 1.0, 0.0))
        tl.store(gradient + cols, tl.where(inside, g, 0.0).to(gradient.dtype.element_ty), mask=cols < high)
    return tl.sum(phi_sum, 0)


@triton.jit
def _zeros(gradient, low, high, B: tl.constexpr):
    for start in range(low, high, B):
        cols = start + tl.arange(0, B)
        tl.store(gradient + cols, tl.zeros([B], gradient.dtype.element_ty), mask=cols < high)


@triton.jit
def _events(
    student,
    log_probs,
    ids,
    log_tail,
    vocab,
    kept,
    s_top,
    s_sum,
    rest,
    c,
    beta,
    KIND: tl.constexpr,
    K: tl.constexpr,
):
    """The K + 1 events of a truncated teacher, the tail after the kept: phi's sum, psi and psi's sum, p, ids.

    An id outside the vocabulary makes a NaN of the sum of phi, and so of the row.
    """
    lane = tl.arange(0, K)
    ids_kept = tl.load(ids + lane, mask=lane < kept, other=_NO_ID)
    is_kept = ids_kept != _NO_ID
    outside = is_kept & ((ids_kept < 0) | (ids_kept >= vocab))
    z = tl.load(student + ids_kept, mask=is_kept & ~outside, other=-INF).to(tl.float32) - s_top
    tail = lane == kept
    # In logs, for a mass that is 0 as a float32 number may be none.
    a = tl.where(tail, tl.log(rest), z * (c * LN2)) - tl.log(s_sum)
    b = tl.load(log_probs + lane, mask=is_kept, other=-INF).to(tl.float32)
    b = tl.where(tail, tl.load(log_tail).to(tl.float32), b)
    p = tl.where(tail, rest, tl.exp2(z * c)) / s_sum
    d = tl.where((a == -INF) & (b == -INF), 0.0, b - a)
    phi, psi = slope(p, tl.exp2(b * LOG2E), d, beta, KIND)
    real = is_kept | tail
    psi_sum = tl.sum(tl.where(real, psi, 0.0), 0)
    phi_sum = tl.sum(tl.where(real, phi, 0.0), 0)
    bad = tl.max(outside.to(tl.int32), 0) > 0
    phi_sum = tl.where(bad, float("nan"), phi_sum)
    psi_sum = tl.where(bad, float("nan"), psi_sum)
    psi_tail = tl.sum(tl.where(tail, psi, 0.0), 0)
    # Of an entry of the tail: dz = psi_tail r - p sum(psi) where r = p s_sum / rest
    tail_slope = tl.where(rest == 0, 0.0, psi_tail * (s_sum / rest)) - psi_sum
    return phi_sum, psi - p * psi_sum, tail_slope, ids_kept, is_kept & ~outside


@triton.jit
def _cost(s_top, s_one, s_label, label, vocab):
    """Cross-entropy of the label's row; NaN for a label outside the vocabulary."""
    nll = tl.log(s_one) - (s_label - s_top)
    return tl.where((label < 0) | (label >= vocab), float("nan"), nll)


@triton.jit
def mark(ids, scale, bits, vocab, kept, ids_stride, words, K: tl.constexpr):
    """Set the bits of the kept ids of each row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(scale + row) != 0:
        lane = tl.arange(0, K)
        id = tl.load(ids + row * ids_stride + lane, mask=lane < kept, other=-1)
        inside = (id >= 0) & (id < vocab)
        tl.atomic_or(bits + row * words + id // 32, 1 << (id % 32), mask=inside, sem="relaxed")


@triton.jit
def _kept_slopes(slopes, z, ids, label, s_top, s_one, kd, ce, CE: tl.constexpr):
    """The gradient at the kept ids, whose logits are ``z``."""
    g = kd * slopes
    if CE:
        p = tl.exp2((z - s_top) * LOG2E) * (1.0 / s_one)
        g += ce * (p - tl.where(ids == label, 1.0, 0.0))
    return g


@triton.jit
def whole_rows(
    student,
    teacher,
    ids,
    log_tail,
    bits,
    labels,
    scale,
    gradient,
    loss,
    vocab,
    width,
    kept,
    words,
    student_stride,
    teacher_stride,
    ids_stride,
    gradient_stride,
    kd,
    ce,
    kd_slope,
    c,
    beta,
    KIND: tl.constexpr,
    KD: tl.constexpr,
    DENSE: tl.constexpr,
    CE: tl.constexpr,
    GRADIENT: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """A row a program: its loss and, with ``GRADIENT``, its gradient."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    weight = tl.load(scale + row)
    if weight == 0:
        tl.store(loss + row, 0.0)
        if GRADIENT:
            _zeros(gradient + row * gradient_stride, 0, width, B)
    else:
        teacher += row * teacher_stride
        label = tl.full([], -1, tl.int64)
        if CE:
            label = tl.load(labels + row)
        s_top, s_sum, s_one, t_top, t_sum, rest, s_label = _statistics(
            student, teacher, bits + row * words, label, 0, vocab, c, KD, DENSE, CE, B
        )
        cost = 0.0
        if CE:
            cost = _cost(s_top, s_one, s_label, label, vocab)
            s_one = tl.where(cost != cost, cost, s_one)
        value = 0.0
        psi_sum = 0.0
        tail_slope = 0.0
        if KD and DENSE and (KIND != "forward_kl" or not GRADIENT):
            value, psi_sum = _sums(student, teacher, 0, vocab, s_top, s_sum, t_top, t_sum, c, beta, KIND, B)
        if KD and not DENSE:
            value, slopes, tail_slope, kept_ids, is_kept = _events(
                student,
                teacher,
                ids + row * ids_stride,
                log_tail + row,
                vocab,
                kept,
                s_top,
                s_sum,
                rest,
                c,
                beta,
                KIND,
                K,
            )
        if GRADIENT:
            gradient += row * gradient_stride
            if KD and not DENSE:
                z = tl.load(student + kept_ids, mask=is_kept, other=-INF).to(tl.float32)
                at_kept = _kept_slopes(
                    slopes, z, kept_ids, label, s_top, s_one, weight * kd_slope, weight * ce, CE
                )
                tl.debug_barrier()  # read before the gradient takes the student's place
            phi_sum = _slopes(
                student,
                teacher,
                gradient,
                label,
                0,
                width,
                vocab,
                s_top,
                s_sum,
                s_one,
                t_top,
                t_sum,
                psi_sum,
                tail_slope,
                weight * kd_slope,
                weight * ce,
                c,
                beta,
                KIND,
                KD,
                DENSE,
                CE,
                B,
            )
            if KD and DENSE and KIND == "forward_kl":
                value = phi_sum
            if KD and not DENSE:
                tl.debug_barrier()  # over what the sweep wrote there
                tl.store(gradient + kept_ids, at_kept.to(gradient.dtype.element_ty), mask=is_kept)
        tl.store(loss + row, weight * (kd * value + ce * cost))


@triton.jit
def part_statistics(
    student,
    teacher,
    bits,
    labels,
    scale,
    partials,
    vocab,
    span,
    words,
    student_stride,
    teacher_stride,
    c,
    KD: tl.constexpr,
    DENSE: tl.constexpr,
    CE: tl.constexpr,
    B: tl.constexpr,
):
    """Part ``program_id(1)`` of a row is ``span`` columns."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if tl.load(scale + row) != 0:
        label = tl.full([], -1, tl.int64)
        if CE:
            label = tl.load(labels + row)
        low = part * span
        s_top, s_sum, s_one, t_top, t_sum, rest, s_label = _statistics(
            student + row * student_stride,
            teacher + row * teacher_stride,
            bits + row * words,
            label,
            low,
            tl.minimum(low + span, vocab),
            c,
            KD,
            DENSE,
            CE,
            B,
        )
        at = partials + (row * tl.num_programs(1) + part) * _FIELDS
        tl.store(at + _S_MAX, s_top)
        tl.store(at + _S_SUM, s_sum)
        tl.store(at + _S_ONE, s_one)
        tl.store(at + _T_MAX, t_top)
        tl.store(at + _T_SUM, t_sum)
        tl.store(at + _REST, rest)
        tl.store(at + _LABEL, s_label)


@triton.jit
def part_sums(
    student,
    teacher,
    scale,
    partials,
    sums,
    vocab,
    span,
    student_stride,
    teacher_stride,
    c,
    beta,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    B: tl.constexpr,
):
    """``sums [N, S, 2]``: of phi and psi."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    if tl.load(scale + row) != 0:
        s_top, s_sum, _, t_top, t_sum, _, _ = _combined(partials + row * parts * _FIELDS, parts, c, PARTS)
        low = part * span
        phi_sum, psi_sum = _sums(
            student + row * student_stride,
            teacher + row * teacher_stride,
            low,
            tl.minimum(low + span, vocab),
            s_top,
            s_sum,
            t_top,
            t_sum,
            c,
            beta,
            KIND,
            B,
        )
        at = sums + (row * parts + part) * 2
        tl.store(at, phi_sum)
        tl.store(at + 1, psi_sum)


@triton.jit
def row_events(
    student,
    log_probs,
    ids,
    log_tail,
    labels,
    scale,
    partials,
    sums,
    at_kept,
    vocab,
    kept,
    parts,
    student_stride,
    log_probs_stride,
    ids_stride,
    ce,
    kd_slope,
    c,
    beta,
    KIND: tl.constexpr,
    CE: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
):
    """What parts need of a truncated teacher: in ``sums [N, S, 2]`` the sum of phi, and the tail's slope."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(scale + row)
    if weight != 0:
        s_top, s_sum, s_one, _, _, rest, s_label = _combined(
            partials + row * parts * _FIELDS, parts, c, PARTS
        )
        student += row * student_stride
        value, slopes, tail_slope, kept_ids, is_kept = _events(
            student,
            log_probs + row * log_probs_stride,
            ids + row * ids_stride,
            log_tail + row,
            vocab,
            kept,
            s_top,
            s_sum,
            rest,
            c,
            beta,
            KIND,
            K,
        )
        part = tl.arange(0, PARTS)
        at = sums + (row * parts + part) * 2
        tl.store(at, tl.where(part == 0, value, 0.0), mask=part < parts)
        tl.store(at + 1, tl.where(part == 0, tail_slope, 0.0), mask=part < parts)
        if GRADIENT:
            label = tl.full([], -1, tl.int64)
            if CE:
                label = tl.load(labels + row)
                cost = _cost(s_top, s_one, s_label, label, vocab)
                s_one = tl.where(cost != cost, cost, s_one)
            z = tl.load(student + kept_ids, mask=is_kept, other=-INF).to(tl.float32)
            g = _kept_slopes(slopes, z, kept_ids, label, s_top, s_one, weight * kd_slope, weight * ce, CE)
            lane = tl.arange(0, K)
            tl.store(at_kept + row * kept + lane, g, mask=lane < kept)


@triton.jit
def part_slopes(
    student,
    teacher,
    ids,
    labels,
    scale,
    partials,
    sums,
    at_kept,
    gradient,
    vocab,
    width,
    span,
    kept,
    student_stride,
    teacher_stride,
    ids_stride,
    gradient_stride,
    ce,
    kd_slope,
    c,
    beta,
    KIND: tl.constexpr,
    KD: tl.constexpr,
    DENSE: tl.constexpr,
    CE: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """The gradient of a part; of forward KL the sum of phi too."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    low = part * span
    high = tl.minimum(low + span, width)
    if part == parts - 1:
        high = width
    gradient += row * gradient_stride
    weight = tl.load(scale + row)
    if weight == 0:
        _zeros(gradient, low, high, B)
    else:
        s_top, s_sum, s_one, t_top, t_sum, _, s_label = _combined(
            partials + row * parts * _FIELDS, parts, c, PARTS
        )
        label = tl.full([], -1, tl.int64)
        if CE:
            label = tl.load(labels + row)
            cost = _cost(s_top, s_one, s_label, label, vocab)
            s_one = tl.where(cost != cost, cost, s_one)
        psi_sum = 0.0
        tail_slope = 0.0
        if KD and (KIND != "forward_kl" or not DENSE):
            one = tl.arange(0, PARTS)
            second = tl.sum(tl.load(sums + (row * parts + one) * 2 + 1, mask=one < parts, other=0.0), 0)
            if DENSE:
                psi_sum = second
            else:
                tail_slope = second
        phi_sum = _slopes(
            student + row * student_stride,
            teacher + row * teacher_stride,
            gradient,
            label,
            low,
            high,
            vocab,
            s_top,
            s_sum,
            s_one,
            t_top,
            t_sum,
            psi_sum,
            tail_slope,
            weight * kd_slope,
            weight * ce,
            c,
            beta,
            KIND,
            KD,
            DENSE,
            CE,
            B,
        )
        if KD and DENSE and KIND == "forward_kl":
            tl.store(sums + (row * parts + part) * 2, phi_sum)
        if KD and not DENSE:
            lane = tl.arange(0, K)
            id = tl.load(ids + row * ids_stride + lane, mask=lane < kept, other=-1)
            here = (id >= low) & (id < high) & (id < vocab)
            g = tl.load(at_kept + row * kept + lane, mask=here, other=0.0)
            tl.debug_barrier()  # over what the sweep wrote there
            tl.store(gradient + id, g.to(gradient.dtype.element_ty), mask=here)


@triton.jit
def finish(
    labels,
    scale,
    partials,
    sums,
    loss,
    vocab,
    parts,
    kd,
    ce,
    c,
    KD: tl.constexpr,
    CE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The loss of a row from what its parts have."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(scale + row)
    if weight == 0:
        tl.store(loss + row, 0.0)
    else:
        s_top, _, s_one, _, _, _, s_label = _combined(partials + row * parts * _FIELDS, parts, c, PARTS)
        value = 0.0
        if KD:
            part = tl.arange(0, PARTS)
            value = tl.sum(tl.load(sums + (row * parts + part) * 2, mask=part < parts, other=0.0), 0)
        cost = 0.0
        if CE:
            cost = _cost(s_top, s_one, s_label, tl.load(labels + row), vocab)
        tl.store(loss + row, weight * (kd * value + ce * cost))


@triton.jit
def scaled(gradient, upstream, result, n, B: tl.constexpr):
    """``result = gradient * upstream``, multiplied in float32."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    g = tl.load(gradient + at, mask=at < n, other=0.0).to(tl.float32) * tl.load(upstream).to(tl.float32)
    tl.store(result + at, g.to(result.dtype.element_ty), mask=at < n)
