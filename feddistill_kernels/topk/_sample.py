"""Entries drawn at random in place of the likeliest."""

import math

import torch
from torch import Tensor

from feddistill_kernels._check import bind, floating, positive_temperature, rows_with_a_choice
from feddistill_kernels.topk._reference import union
from feddistill_kernels.topk._value import TopK

CHUNK = 1 << 20
"""Entries worked on at once: at most 8 MiB a temporary."""


def topk_sample(
    logits: Tensor,
    draws: int,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
) -> TopK:
    """Draw entries of each row at random, so that a student's gradient is right on average.

    With ``p = softmax(logits / T)``, ``draws`` ids a row are drawn with replacement from ``r``, and ``q`` is
    made of how often each was::

        r_v = p_v^(1 / proposal_temperature) / sum_u p_u^(1 / proposal_temperature)
        q_v = count_v / draws * p_v / r_v              E[q_v] = p_v for every v

    (Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025.)  What
    ``topk_compress`` leaves out at every step is drawn here at some, so a student is not taught that what is
    rare is impossible.

    The result is a teacher like any ``TopK``: its ids carry ``log q``, its tail nothing.  Its ``forward_kl``
    has the gradient ``sum(q) softmax(z)_v - q_v`` in the student's logits ``z`` (at T = 1), linear in q, so
    its mean over draws is the dense gradient ``softmax(z)_v - p_v``, whatever ``draws`` and
    ``proposal_temperature`` are.  The value of the loss has no such mean, for it has ``q log q`` in it, nor
    has the gradient of any other kind; ``reverse_kl`` is ``inf``.

    At ``proposal_temperature = 1``, ``q_v = count_v / draws`` and a row of q adds to 1.  Otherwise it does so
    on average only: dividing by its sum would bias it.  Above 1 rare ids are drawn more often and weigh less,
    below 1 the other way; the variance of q_v is ``p_v (p_v / r_v - p_v) / draws``.

    Args:
        logits: ``[N, V]``, float16, bfloat16, float32 or float64; log-probabilities do as well.  ``-inf``
            marks a token ruled out, which is never drawn.  No gradient.
        draws: At least 1; may exceed V.
        generator: On the device of ``logits``.  The result depends on its state and nothing else, and moves
            it on by ``N * draws`` numbers.
        temperature: ``T > 0``, that of the loss.
        proposal_temperature: > 0.

    Returns:
        ``TopK`` with ascending ids, ``K = min(draws, V)`` a row, float32 (float64 for float64 logits), and
        ``log_tail`` of ``-inf``.  Where fewer ids than K were drawn, the lowest of the others fill up, with
        ``log_probs`` of ``-inf``.  A NaN logit gives NaN in its row only.

    Raises:
        ValueError: ``draws`` or a temperature is out of range, ``logits`` is not ``[N, V]``, the generator is
            on another device; on the CPU also for a row of nothing but ``-inf``.

    Memory:
        The result, a float64 for each draw and bounded temporaries.

    There are no backends to choose from, and it is no operator of ``torch.library``: a generator does not
    travel through one.  Inside ``torch.compile`` it breaks the graph; call it outside.

    Example:
        >>> logits = torch.tensor([[0.6, 0.1, 0.2, 0.1]]).log()
        >>> drawn = topk_sample(logits, 3, generator=torch.Generator().manual_seed(0))
        >>> drawn.ids, drawn.log_probs.exp()
        (tensor([[0, 2, 3]], dtype=torch.int32), tensor([[0.3333, 0.3333, 0.3333]]))
    """
    n, vocab = bind("N V", logits=logits)
    floating(logits=logits)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    positive_temperature(temperature)
    if not 0 < proposal_temperature < math.inf:
        raise ValueError(f"proposal_temperature must be positive and finite, got {proposal_temperature}")
    if generator.device != logits.device:
        raise ValueError(f"generator is on {generator.device}, logits are on {logits.device}")
    logits, kept = logits.detach(), min(draws, vocab)
    ids = torch.empty((n, kept), dtype=torch.int32, device=logits.device)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = torch.empty((n, kept), dtype=dtype, device=logits.device)
    # All at once, for chunks must not decide who gets which; float64, for float32 has 2^24 values in [0, 1).
    uniform = torch.rand((n, draws), generator=generator, dtype=torch.float64, device=logits.device)
    step = max(1, CHUNK // max(1, vocab))
    for start in range(0, n, step):
        part = slice(start, start + step)
        z = logits[part].to(dtype) / temperature
        rows_with_a_choice("logits", z, start=start)
        z = z - z.amax(-1, keepdim=True)
        cumulative = (z / proposal_temperature).exp().cumsum(-1, dtype=torch.float64)
        drawn = _invert(cumulative, uniform[part])
        wanted = union([drawn], kept)
        counts = torch.searchsorted(drawn, wanted, right=True) - torch.searchsorted(drawn, wanted)
        # log(p / r), of which the same terms cancel at a proposal_temperature of 1.
        ratio = z.gather(-1, wanted) * (1 - 1 / proposal_temperature)
        ratio += cumulative[:, -1:].log() - z.exp().sum(-1, keepdim=True, dtype=torch.float64).log()
        ids[part] = wanted.to(torch.int32)
        log_probs[part] = torch.where(counts == 0, -math.inf, ratio + (counts.to(dtype) / draws).log())
    return TopK(ids, log_probs, torch.full_like(log_probs[:, 0], -math.inf), vocab)


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Ascending ids ``[n, draws]`` of the distribution with ``cumulative [n, V]``."""
    total = cumulative[:, -1:]
    # Below the total: rounded up to it, a draw would be the last id, were it ruled out or not.
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return (
        torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1).sort(-1).values
    )
