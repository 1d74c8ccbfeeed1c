"""A distribution by its k likeliest entries and the mass of the others."""

from torch import Tensor

from feddistill_kernels._backend import named
from feddistill_kernels._check import bind, floating, positive_temperature
from feddistill_kernels.topk._op import compress
from feddistill_kernels.topk._sample import topk_sample
from feddistill_kernels.topk._value import TopK

__all__ = ["TopK", "topk_compress", "topk_sample"]


def topk_compress(
    logits: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    id_order: bool = True,
    backend: str | None = None,
) -> TopK:
    """Keep the ``k`` likeliest entries of each row, and the mass of the others.

    With ``a = log_softmax(logits / T)`` and ``S`` the ``k`` largest entries of a row::

        log_probs = a[S]        log_tail = logsumexp(a[not S])

    The tail is summed from what is in it, not taken as ``1 - sum(kept)``: it has full precision where it is
    tiny, and is exactly ``-inf`` at ``k = V``.  Of equal entries the lowest id is kept, on every backend.

    Args:
        logits: ``[N, V]``, float16, bfloat16, float32 or (reference only) float64; log-probabilities do as
            well.  ``-inf`` marks a token ruled out.  No gradient: compressed answers are teachers.
        k: In ``[1, V]``.
        temperature: ``T > 0``.
        id_order: Ascending ids within a row; else descending probability, equal ones by ascending id.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; ``None`` takes the best for the device.

    Returns:
        ``TopK`` with float32 ``log_probs [N, k]`` and ``log_tail [N]`` (float64 for float64 logits).  A NaN
        logit gives NaN in its row only.

    Raises:
        ValueError: ``k`` or ``temperature`` is out of range, ``logits`` is not ``[N, V]``; on the CPU also
            for a row of nothing but ``-inf``, which elsewhere gives NaN.
        BackendError: ``backend`` was named and cannot run here; ``"triton"`` keeps at most 1024.

    Memory:
        The result.  Temporaries are bounded, whatever N and V are.

    Example:
        >>> import torch
        >>> kept = topk_compress(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 2)
        >>> kept.ids
        tensor([[1, 3]], dtype=torch.int32)
        >>> kept.log_probs.exp(), kept.log_tail.exp()
        (tensor([[0.3995, 0.3995]]), tensor([0.2010]))
    """
    _, vocab = bind("N V", logits=logits)
    floating(logits=logits)
    if not 1 <= k <= vocab:
        raise ValueError(f"k must be in [1, {vocab}], the vocabulary, got {k}")
    positive_temperature(temperature)
    given = logits.detach() if logits.requires_grad else logits
    ids, log_probs, log_tail = compress(given, k, float(temperature), id_order, named(backend))
    return TopK.of_operator(ids, log_probs, log_tail, vocab)
