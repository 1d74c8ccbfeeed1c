"""The kinds as Triton reads them: phi and psi of p, q and d = log(q / p); see ``_kinds.py``."""

import triton
import triton.language as tl

from feddistill_kernels._kinds import SKEW as SKEW_SHARE

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SKEW = tl.constexpr(SKEW_SHARE)

KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl")
"""The kinds that ``slope`` knows: another one does not compile."""
_FORWARD_KL, _REVERSE_KL, _JSD, _TVD, _SKEW_FORWARD_KL, _SKEW_REVERSE_KL = map(tl.constexpr, KINDS)


@triton.jit
def slope(p, q, d, beta, KIND: tl.constexpr):
    """``phi`` and ``psi`` of a kind.  ``d`` is 0 where p and q are both 0."""
    if KIND == _FORWARD_KL:
        phi = _kl(q, p, d)
        psi = p - q
    elif KIND == _REVERSE_KL:
        phi = _kl(p, q, -d)
        psi = _times(p, -d)
    elif KIND == _JSD:
        m = beta * q + (1 - beta) * p
        p_over, q_over = _over_mixture(d, beta)
        phi = beta * _bregman(q, m, q_over) + (1 - beta) * _bregman(p, m, p_over)
        psi = (1 - beta) * _times(p, p_over)
    elif KIND == _TVD:
        size = tl.abs(d)
        near = tl.maximum(p, q) * size * _expm1_over(-size)
        phi = 0.5 * tl.where(size < 0.5, near, tl.abs(p - q))
        half = 0.5 * p
        psi = tl.where(d < 0, half, tl.where(d > 0, -half, half * d))  # half * NaN is NaN
    elif KIND == _SKEW_FORWARD_KL:
        _, q_over = _over_mixture(d, SKEW)
        phi = _bregman(q, SKEW * q + (1 - SKEW) * p, q_over)
        psi = (SKEW - 1) * _times(p, _expm1(q_over))
    else:
        tl.static_assert(KIND == _SKEW_REVERSE_KL)
        p_over, _ = _over_mixture(d, 1 - SKEW)
        phi = _bregman(p, SKEW * p + (1 - SKEW) * q, p_over)
        psi = _times(p, p_over - SKEW * _expm1(p_over))
    return phi, psi


@triton.jit
def _bregman(q, p, d):
    """``q (e^-d - 1 + d)`` with p = q e^-d."""
    # (e^-d - 1 + d) / d^2 for |d| < 1/2, 5e-8 relative
    ratio = -0.0001987562907926877 * d + 0.0013981997364460388
    ratio = ratio * d - 0.00833345217296455
    ratio = ratio * d + 0.04166579594171024
    ratio = ratio * d - 0.1666666545783386
    ratio = ratio * d + 0.5000000120139753
    first = q * d
    phi = tl.where(tl.abs(d) < 0.5, first * (d * ratio), first + (p - q))
    return tl.where(q == 0, p, phi)


@triton.jit
def _kl(q, p, d):
    return tl.where(d == INF, INF, _bregman(q, p, d))


@triton.jit
def _times(p, h):
    """``p h``, where h may be infinite and p 0."""
    return tl.where(p == 0, p, p * h)


@triton.jit
def _over_mixture(d, beta):
    """``log(p / m)`` and ``log(q / m)`` of ``m = beta q + (1 - beta) p``."""
    size = tl.abs(d)
    share = tl.where(d > 0, 1 - beta, beta)  # of the smaller one
    larger = -_log1p_negative(share * _expm1_negative(-size))
    smaller = larger - size
    return tl.where(d > 0, smaller, larger), tl.where(d > 0, larger, smaller)


@triton.jit
def _expm1_over(x):
    """``(e^x - 1) / x`` for -1/2 <= x <= 0."""
    ratio = 0.001121634840145323 * x + 0.00818738589683897
    ratio = ratio * x + 0.04162908909480141
    ratio = ratio * x + 0.16666224081888345
    ratio = ratio * x + 0.4999998074605449
    return ratio * x + 0.9999999986263927


@triton.jit
def _expm1_negative(x):
    return tl.where(x < -0.5, tl.exp2(x * LOG2E) - 1, x * _expm1_over(x))


@triton.jit
def _expm1(x):
    return tl.where(x > 0, tl.exp2(x * LOG2E) - 1, _expm1_negative(x))


@triton.jit
def _log1p_negative(x):
    """For -1 < x <= 0."""
    u = x + 1
    # u = 2^e m with m in [sqrt(1/2), sqrt(2)); where u is there already, x itself has more digits than u - 1.
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    y = tl.where(e == 0, x, m - 1)
    ratio = -0.07621119773998632 * y + 0.12904663705800587
    ratio = ratio * y - 0.13243461339197307
    ratio = ratio * y + 0.14181834502454474
    ratio = ratio * y - 0.16609012751364055
    ratio = ratio * y + 0.2000196853850237
    ratio = ratio * y - 0.2500158655787477
    ratio = ratio * y + 0.3333332599280242
    ratio = ratio * y - 0.499999882897008
    ratio = ratio * y + 0.9999999999590771
    return tl.where(x == x, e.to(tl.float32) * LN2 + y * ratio, x)  # the bits of NaN are no number
