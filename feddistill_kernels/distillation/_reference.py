"""The loss as it reads on paper.  Every other backend must agree with this file.

The contract of a backend is one function, ``rows``: the loss of each row and, if memory for it is given,
the gradient, each times that row's ``scale``.  Every reduction, mask and upstream gradient is a ``scale``.
"""

import math

import torch
from torch import Tensor

from feddistill_kernels._check import NO_ID, distinct_ids, labels_in_vocabulary, rows_with_a_choice
from feddistill_kernels._kinds import KINDS

CHUNK = 1 << 20
"""Entries worked on at once: a dozen float32 temporaries of 4 MiB, whatever ``N`` and ``V`` are.

Four times as many take 1.5 times as long on a CPU, out of its cache; a quarter as many would starve a GPU."""


def rows(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    log_tail: Tensor | None,
    labels: Tensor | None,
    scale: Tensor,
    gradient: Tensor | None,
    *,
    vocab: int,
    kind: str,
    beta: float,
    temperature: float,
    kd: float,
    ce: float,
) -> Tensor:
    """Return ``scale * (kd D + ce CE)`` ``[N]`` and write its gradient to ``gradient [N, >= V]``.

    ``teacher`` is ``[N, V]`` logits or, with ``ids`` and ``log_tail``, ``[N, K]`` log-probabilities.  Rows of
    ``scale`` 0 are not looked at.  ``gradient`` may be ``student``.  Columns past ``vocab`` are a pad.
    """
    n, width = student.shape
    loss = scale.new_empty(n)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, n, step):
        part = slice(start, start + step)
        live = scale[part] != 0
        z = torch.where(live[:, None], student[part, :vocab].to(scale.dtype), 0.0)  # [n, V]
        rows_with_a_choice("student", z, start=start)
        cost, dz = torch.zeros_like(scale[part]), torch.zeros_like(z)
        if kd:
            t = torch.where(live[:, None], teacher[part].to(scale.dtype), 0.0)  # [n, V] or [n, K]
            if ids is None or log_tail is None:
                rows_with_a_choice("teacher", t, start=start)
                value, slope = _dense(z / temperature, t / temperature, kind, beta)
            else:
                tail = torch.where(live, log_tail[part].to(scale.dtype), 0.0)
                kept = torch.where(live[:, None], ids[part], NO_ID)
                distinct_ids("teacher", kept, vocab, start=start)
                value, slope = _truncated(z / temperature, kept.long(), t, tail, kind, beta)
            cost += kd * value
            dz += (kd / temperature) * slope
        if ce and labels is not None:
            target = torch.where(live, labels[part], 0)[:, None]
            labels_in_vocabulary(target[:, 0], vocab, start=start)
            a = z.log_softmax(-1)
            cost -= ce * a.gather(-1, target)[:, 0]
            dz += ce * a.exp().scatter_add_(-1, target, torch.full_like(a[:, :1], -1.0))
        loss[part] = torch.where(live, scale[part] * cost, 0.0)
        if gradient is not None:
            gradient[part, :vocab] = torch.where(live[:, None], scale[part, None] * dz, 0.0).to(
                gradient.dtype
            )
            gradient[part, vocab:] = 0
    return loss


def scale_into(gradient: Tensor, upstream: Tensor, result: Tensor) -> None:
    """Write ``gradient [N, V]`` times the scalar ``upstream``, multiplied in float32.

    torch would round ``upstream`` to a half-precision gradient's dtype first: 0.4 % off for all of it.
    """
    step = max(1, CHUNK // max(1, gradient.shape[1]))
    for start in range(0, len(gradient), step):
        part = slice(start, start + step)
        result[part] = (gradient[part].to(upstream.dtype) * upstream).to(result.dtype)


def _dense(z: Tensor, t: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence ``[n]`` and its gradient ``[n, V]`` in ``z``."""
    a, b = z.log_softmax(-1), t.log_softmax(-1)
    phi, psi = KINDS[kind](a, b, beta)
    return phi.sum(-1), psi - a.exp() * psi.sum(-1, keepdim=True)


def _truncated(
    z: Tensor, ids: Tensor, b_kept: Tensor, b_tail: Tensor, kind: str, beta: float
) -> tuple[Tensor, Tensor]:
    """The same over K + 1 events: the kept ids, and all others as one.

    Where u is in the tail, p_u = P_tail r_u with r the softmax over the tail, so
    dz_u = psi_tail r_u - p_u sum(psi).  No entry is an event that both rule out, in a column V.
    """
    a = z.log_softmax(-1)
    padded = torch.nn.functional.pad(a, (0, 1), value=-math.inf)  # [n, V + 1]
    none = ids == NO_ID
    ids = torch.where(none, z.shape[1], ids)
    a_kept = padded.gather(-1, ids)
    others = padded.scatter_(-1, ids, -math.inf)
    # As a sum of what is in it: log(1 - sum of the kept) would have no digits where the tail is small.
    a_tail = others.logsumexp(-1, keepdim=True)  # [n, 1]
    events_a = torch.cat([a_kept, a_tail], dim=-1)  # [n, K + 1]
    events_b = torch.cat([b_kept.masked_fill(none, -math.inf), b_tail[:, None]], dim=-1)
    phi, psi = KINDS[kind](events_a, events_b, beta)
    within = torch.where(a_tail == -math.inf, 0.0, (others - a_tail).exp())
    slope = (psi[:, -1:] * within).scatter_(-1, ids, psi[:, :-1])[:, :-1]
    return phi.sum(-1), slope - a.exp() * psi.sum(-1, keepdim=True)
