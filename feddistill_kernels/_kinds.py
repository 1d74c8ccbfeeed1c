"""Divergences between two softmaxes: a kind is two scalar functions of two log-probabilities.

With ``a = log p`` of the student and ``b = log q`` of the teacher, ``sum_v phi_v`` has the gradient

    psi_v - p_v * sum_u psi_u,        psi_v = p_v * dphi_v/dp_v

with respect to the student's ``z``, ``p = softmax(z)``.  Nothing else here knows one kind from another.

Every ``phi`` is written so that it is >= 0 by itself.  A KL is a Bregman divergence:

    KL(q || p) = sum q (b - a) = sum q (e^-d - 1 + d),   d = b - a,   as sum q e^-d = sum p = 1 = sum q

and where the plain form adds numbers of either sign that cancel to nothing, this adds only what is left.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SKEW = 0.1
"""A distribution's own share of the mixture in the skewed kinds (Ko et al., "DistiLLM", ICML 2024)."""

Kind = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _forward_kl(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    p, q = a.exp(), b.exp()
    # A student that rules a token out is infinitely wrong even where q, finite in logs, rounds to 0.
    ruled_out = (a == -math.inf) & (b > -math.inf)
    return torch.where(ruled_out, math.inf, _bregman(q, p, _log_ratio(b, a))), p - q


def _reverse_kl(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    phi, _ = _forward_kl(b, a, beta)
    p = a.exp()
    return phi, torch.where(p > 0, p * _log_ratio(a, b), p)


def _jsd(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    if beta == 0:
        return _forward_kl(a, b, beta)
    if beta == 1:
        return _reverse_kl(a, b, beta)
    p, q = a.exp(), b.exp()
    m = beta * q + (1 - beta) * p
    p_over_m, q_over_m = _over_mixture(a, b, beta)
    phi = beta * _bregman(q, m, q_over_m) + (1 - beta) * _bregman(p, m, p_over_m)
    return phi, (1 - beta) * _times(p, p_over_m)


def _tvd(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    d = _log_ratio(a, b)
    p, larger = a.exp(), torch.maximum(a, b).exp()
    sign = torch.where(d.isnan(), d, d.sign())  # torch's sign of NaN is 0
    return -0.5 * larger * torch.expm1(-d.abs()), 0.5 * p * sign


def _skew_forward_kl(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    p, q = a.exp(), b.exp()
    _, q_over_m = _over_mixture(a, b, SKEW)
    phi = _bregman(q, SKEW * q + (1 - SKEW) * p, q_over_m)
    return phi, -(1 - SKEW) * p * torch.expm1(q_over_m)


def _skew_reverse_kl(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    p, q = a.exp(), b.exp()
    p_over_m, _ = _over_mixture(a, b, 1 - SKEW)
    phi = _bregman(p, SKEW * p + (1 - SKEW) * q, p_over_m)
    return phi, _times(p, p_over_m) - SKEW * p * torch.expm1(p_over_m)


KINDS: dict[str, Kind] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}
"""All kinds.  A backend that does not have one leaves it to the reference, see ``unknown_kind``."""


def unknown_kind(kind: str, known: Iterable[str]) -> str:
    """Why a backend that has the ``known`` kinds cannot compute ``kind``."""
    return f"it has no kind {kind!r}, only {', '.join(known)}"


def _log_ratio(x: Tensor, y: Tensor) -> Tensor:
    """``x - y`` of log-probabilities; 0 where both rule the token out."""
    return torch.where((x == -math.inf) & (y == -math.inf), 0.0, x - y)


def _times(p: Tensor, h: Tensor) -> Tensor:
    """``p h``, 0 where ``p`` is 0 and ``h`` is ``-inf``."""
    return torch.where(p == 0, p, p * h)


def _bregman(q: Tensor, p: Tensor, d: Tensor) -> Tensor:
    """``q (e^-d - 1 + d)`` where ``d = log(q / p)``: >= 0, and precise for every ``d``."""
    series = q * d * d * (1 / 2 + d * (-1 / 6 + d * (1 / 24 + d * (-1 / 120 + d / 720))))
    middle = q * (torch.expm1(-d) + d)
    far = p - q + q * d  # p is the large one: e^-d may overflow where p = q e^-d does not
    phi = torch.where(d.abs() < 0.05, series, torch.where(d > -1, middle, far))
    return torch.where(q == 0, p, phi)


def _over_mixture(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``log(p / m)`` and ``log(q / m)`` of ``m = beta q + (1 - beta) p``, from their ratio alone.

    The larger of p and q stands before the bracket: q (beta + (1 - beta) e^-d) or p (1 - beta + beta e^d).
    """
    d = _log_ratio(b, a)
    share = torch.where(d > 0, 1 - beta, beta)  # of the smaller one
    larger = -torch.log1p(share * torch.expm1(-d.abs()))
    smaller = larger - d.abs()
    return torch.where(d > 0, smaller, larger), torch.where(d > 0, larger, smaller)
