"""Many clients' compressed answers to one, without opening them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._backend import named
from feddistill_kernels._check import one_of, same_device
from feddistill_kernels.aggregation._op import aggregate
from feddistill_kernels.topk import TopK

__all__ = ["aggregate_topk", "rules"]

# Rule: whether it takes weights.
RULES = {"mean_probs": True, "mean_logits": True, "median": False, "trimmed_mean": False}


def rules() -> tuple[str, ...]:
    """Names of the rules of ``aggregate_topk``.

    >>> rules()
    ('mean_probs', 'mean_logits', 'median', 'trimmed_mean')
    """
    return tuple(RULES)


def aggregate_topk(
    clients: Sequence[TopK],
    rule: str,
    *,
    weights: Tensor | None = None,
    trim: int | None = None,
    k: int | None = None,
    backend: str | None = None,
) -> TopK:
    """Aggregate compressed answers: as the rule on the dense ones, renormalised.

    With ``x_cv`` client c's log-probability of id v, its uniform tail value ``log_tail - log(V - K)`` where
    it did not keep v, and ``w`` the weights, divided by their sum::

        mean_probs      y_v = log sum_c w_c exp(x_cv)          trimmed_mean    y_v = trimmed mean_c x_cv
        mean_logits     y_v = sum_c w_c x_cv                   median          y_v = median_c x_cv

        result = y - logsumexp(y)

    An id that nobody kept gets the same y as any other such id, so this is exactly the rule on
    ``[client.expand() for client in clients]``, while it works on the ids that somebody kept.

    Args:
        clients: ``C`` answers to the same ``N`` rows over the same vocabulary; ``K`` may differ.  No
            gradient.
        rule: One of ``rules()``.
        weights: Floating ``[C]``, or ``[C, N]`` for each row its own, >= 0 and not all 0; the mean rules
            only.  ``None`` for equal ones.
        trim: Clients left out at either end, ``0 <= 2 trim < C``; ``trimmed_mean`` only, which needs it.
        k: Keep the ``k`` likeliest entries of the result (equal ones by ascending id) and move the others
            into the tail.  ``None`` keeps them all.
        backend: ``"reference"``; ``None`` takes the best for the device.

    Returns:
        ``TopK`` with ascending ids and ``min(C K, V)`` entries a row, ``k`` at the most; float32 (float64
        where a client's is).  Rows whose clients agree on ids are filled up with the lowest ids that nobody
        kept, at their tail value: it is the same distribution.

    Raises:
        ValueError: Clients do not fit together, or ``weights``, ``trim`` or ``k`` do not fit the rule.  On
            the CPU also for a row in which no id is left, e.g. by ``mean_logits`` of clients that rule each
            other out; elsewhere such a row is NaN.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        Temporaries of ``C * N * min(C K, V)`` numbers; nothing of size V.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[0, 1]], dtype=torch.int32)
        >>> a = TopK(ids, torch.tensor([[0.5, 0.3]]).log(), torch.tensor([0.2]).log(), vocab_size=4)
        >>> b = TopK(ids + 1, torch.tensor([[0.4, 0.4]]).log(), torch.tensor([0.2]).log(), vocab_size=4)
        >>> mixed = aggregate_topk([a, b], "mean_probs")
        >>> mixed.ids, mixed.log_probs.exp()
        (tensor([[0, 1, 2, 3]], dtype=torch.int32), tensor([[0.3000, 0.3500, 0.2500, 0.1000]]))
    """
    one_of("rule", rule, RULES)
    _check_clients(clients)
    count, vocab, total = len(clients), clients[0].vocab_size, sum(client.ids.shape[1] for client in clients)
    if (rule == "trimmed_mean") != (trim is not None):
        raise ValueError(f"rule {rule!r} {'needs' if trim is None else 'has no'} trim")
    if trim is not None and not 0 <= 2 * trim < count:
        raise ValueError(f"trim must be in [0, {(count - 1) // 2}] for {count} clients, got {trim}")
    if weights is not None:
        _check_weights(clients, rule, weights)
    width = min(total, vocab)
    if k is not None and not 1 <= k <= vocab:
        raise ValueError(f"k must be in [1, {vocab}], the vocabulary, got {k}")
    ids, log_probs, log_tail = aggregate(
        [client.ids for client in clients],
        [client.log_probs.detach() for client in clients],
        [client.missing_log_prob().detach() for client in clients],
        vocab,
        rule,
        weights,
        (count - 1) // 2 if trim is None else trim,
        width if k is None else min(k, width),
        named(backend),
    )
    return TopK(ids, log_probs, log_tail, vocab)


def _check_clients(clients: Sequence[TopK]) -> None:
    if not clients:
        raise ValueError("clients must hold at least one TopK, got an empty list")
    first = clients[0]
    for index, client in enumerate(clients):
        same_device(first.ids, **{f"clients[{index}]": client.ids})
        if (len(client), client.vocab_size) != (len(first), first.vocab_size):
            raise ValueError(
                f"clients[{index}] has {len(client)} rows over {client.vocab_size} entries but "
                f"clients[0] has {len(first)} over {first.vocab_size}"
            )


def _check_weights(clients: Sequence[TopK], rule: str, weights: Tensor) -> None:
    if not RULES[rule]:
        raise ValueError(
            f"rule {rule!r} has no weights; those that have: {', '.join(r for r in RULES if RULES[r])}"
        )
    count, rows = len(clients), len(clients[0])
    if tuple(weights.shape) not in {(count,), (count, rows)}:
        raise ValueError(f"weights must have shape [{count}] or [{count}, {rows}], got {list(weights.shape)}")
    if weights.dtype not in {torch.float32, torch.float64}:
        raise ValueError(f"weights must be float32 or float64, got {weights.dtype}")
    same_device(clients[0].ids, weights=weights)
