"""Aggregation of many clients' compressed answers to one, without expanding them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._backend import named
from feddistill_kernels._check import one_of, same_device
from feddistill_kernels.aggregation._op import aggregate
from feddistill_kernels.aggregation._rules import RULES, Settings
from feddistill_kernels.topk import TopK

__all__ = ["aggregate_topk", "rules"]


def rules() -> tuple[str, ...]:
    """Names of the rules of ``aggregate_topk``.

    >>> rules()
    ('mean_probs', 'mean_logits', 'median', 'trimmed_mean', 'mean_around_median', 'geometric_median', 'krum')
    """
    return tuple(RULES)


def aggregate_topk(
    clients: Sequence[TopK],
    rule: str,
    *,
    weights: Tensor | None = None,
    trim: int | None = None,
    keep: int | None = None,
    byzantine: int | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    mix: int | None = None,
    k: int | None = None,
    backend: str | None = None,
) -> TopK:
    """Aggregate compressed answers: as the rule on the dense ones, renormalised.

    With ``x_cv`` client c's log-probability of id v, its uniform tail value ``log_tail - log(V - K)`` where
    it did not keep v, and ``w`` the weights, divided by their sum, a row's result is ``y - logsumexp(y)``::

        mean_probs          y_v = log sum_c w_c exp(x_cv)
        mean_logits         y_v = sum_c w_c x_cv
        median              y_v = median_c x_cv                            (Yin et al., 2018, definition 1)
        trimmed_mean        y_v = trimmed mean_c x_cv                      (Yin et al., 2018, definition 2)
        mean_around_median  y_v = mean of the keep x_cv nearest to it      (Xie et al., 2018, definition 7)
        geometric_median    y_v = 2 log m_v,  m = argmin_m sum_c |m - s_c|,  s_cv = exp(x_cv / 2)
        krum                y_v = sum_{c in S} x_cv / keep                 (Blanchard et al., 2017)

    All but ``krum`` look at each row by itself.  The geometric median is that of the points ``sqrt(p)``, all
    on one sphere (Hellinger geometry), by Weiszfeld's steps, smoothed (Pillutla et al., "Robust Aggregation
    for Federated Learning", 2022, algorithm 2, with 1e-4), from ``a_c = 1 / C``::

        m = sum_c a_c s_c,   a_c = r_c / sum r,   r_c = 1 / max(1e-4, |s_c - m|)

    Krum chooses for all rows at once.  Each row of each client is centred, as log-probabilities are logits up
    to a constant; ``d_cc'`` are the squared distances, summed over ids and rows; a client's score is the sum
    of its ``C - byzantine - 2`` least ``d`` to others, and S the ``keep`` clients of least score, of equal
    ones the first (keep > 1: multi-Krum)::

        d_cc' = sum_nv (x_cnv - mean_u x_cnu - x_c'nv + mean_u x_c'nu)^2

    Answers that rule different ids out (``-inf``) are infinitely far apart; those that rule out the same are
    centred and compared on the others.  A client with NaN is infinitely far from all others.

    ``mix`` puts nearest-neighbour mixing before the rule: each client becomes, renormalised, the mean of the
    log-probabilities of the ``C - mix`` clients of least ``d_cc'``, itself one of them (Allouah et al.,
    "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023).

    All ids that no client kept get the same y, so this is exactly the rule on
    ``[client.expand() for client in clients]``, computed on the ids that a client kept and one more that
    represents all others.

    Args:
        clients: ``C`` answers to the same ``N`` rows over the same vocabulary; ``K`` may differ, and ids of
            -1 are no entries.  No gradient.
        rule: One of ``rules()``.  A setting of another rule is an error.
        weights: Floating ``[C]``, or ``[C, N]`` for each row its own, >= 0 and not all 0; ``mean_probs`` and
            ``mean_logits``.  ``None`` for equal ones.
        trim: Clients left out at either end, ``0 <= 2 trim < C``; ``trimmed_mean``, which needs it.
        keep: Clients that count, in [1, C]; ``mean_around_median``, which needs it, and ``krum``, where it is
            1 if ``None``, and at most ``C - byzantine``.
        byzantine: Clients that may be Byzantine, ``2 byzantine + 3 <= C``; ``krum``, which needs it.
        tolerance: ``geometric_median`` ends for a row when no ``a_c`` moves by more; 1e-6 if ``None``.
        max_iterations: It ends after as many steps in any case; 64 if ``None``.
        mix: Clients that may be Byzantine, ``0 <= 2 mix < C``: mixes clients before the rule.  ``None`` for
            no mixing.
        k: Keep the ``k`` likeliest entries of the result (equal ones by ascending id) and move the others
            into the tail.  ``None`` keeps them all.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; ``None`` takes the best for the device.

    Returns:
        ``TopK`` with ascending ids and ``min(C K, V)`` entries a row, ``k`` at the most; float32 (float64
        if a client's is).  Rows whose clients agree on ids are filled up with the lowest ids that no client
        kept, at their tail value: it is the same distribution.  NaN of a client is NaN in its row only;
        where distances choose (``krum``, ``mix``), nowhere if others are chosen.

    Raises:
        ValueError: Clients do not fit together, or a setting does not fit the rule.  On the CPU also for a
            client's row with an id twice or outside the vocabulary (elsewhere undefined), and for a row in
            which no id is left, e.g. by ``mean_logits`` of clients that rule each other out;
            elsewhere such a row is NaN.
        BackendError: ``backend`` was named and cannot run here; ``"triton"`` takes at most 64 clients, and
            4096 entries of all of them a row.

    Memory:
        The result, and nothing of size V.  ``native``: some numbers for each of the ``C K`` entries of a row,
        and 2 KiB a client, for each thread.  ``triton``: some 64 MiB, or one row's.
        ``reference``: bounded temporaries, or one row's ``C * min(C K, V)`` numbers.

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
    given = {
        "trim": trim,
        "keep": keep,
        "byzantine": byzantine,
        "tolerance": tolerance,
        "max_iterations": max_iterations,
    }
    _check_names(rule, {"weights": weights, **given})
    settings = _settings(rule, count, {**given, "mix": mix})
    if weights is not None:
        _check_weights(clients, weights)
    width = min(total, vocab)
    if k is not None and not 1 <= k <= vocab:
        raise ValueError(f"k must be in [1, {vocab}], the vocabulary, got {k}")
    ids, log_probs, log_tail = aggregate(
        [client.ids for client in clients],
        [client.log_probs.detach() for client in clients],
        [client.missing_log_prob().detach() for client in clients],
        vocab,
        weights,
        width if k is None else min(k, width),
        *settings,
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


def _check_names(rule: str, given: dict[str, Any]) -> None:
    needs, has = RULES[rule]
    for name, value in given.items():
        if value is None and name in needs:
            raise ValueError(f"rule {rule!r} needs {name}")
        if value is not None and name not in needs + has:
            others = ", ".join(other for other, its in RULES.items() if name in its.needs + its.has)
            raise ValueError(f"rule {rule!r} has no {name}; those that have: {others}")


def _settings(rule: str, count: int, given: dict[str, Any]) -> Settings:
    """``Settings`` of the values that are not ``None``; require their ranges for ``count`` clients."""
    settings = Settings(rule, **{name: value for name, value in given.items() if value is not None})
    half = (count - 1) // 2
    for name in ("trim", "mix"):
        value = given[name]
        if value is not None and not 0 <= value <= half:
            raise ValueError(f"{name} must be in [0, {half}] for {count} clients, got {value}")
    if not settings.byzantine >= 0 or (rule == "krum" and 2 * settings.byzantine + 3 > count):
        raise ValueError(
            "byzantine must be >= 0, and krum needs 2 byzantine + 3 clients: "
            f"got {settings.byzantine} of {count}"
        )
    if not 1 <= settings.keep <= count - settings.byzantine:
        most = "clients less the byzantine" if rule == "krum" else "number of clients"
        raise ValueError(
            f"keep must be in [1, {count - settings.byzantine}], the {most}, got {settings.keep}"
        )
    if not 0 <= settings.tolerance < math.inf:
        raise ValueError(f"tolerance must be >= 0 and finite, got {settings.tolerance}")
    if settings.max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {settings.max_iterations}")
    return settings._replace(trim=half) if rule == "median" else settings  # it trims all it can


def _check_weights(clients: Sequence[TopK], weights: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise ValueError(f"weights must be a tensor, got {type(weights).__name__}")
    count, rows = len(clients), len(clients[0])
    if tuple(weights.shape) not in {(count,), (count, rows)}:
        raise ValueError(f"weights must have shape [{count}] or [{count}, {rows}], got {list(weights.shape)}")
    if weights.dtype not in {torch.float32, torch.float64}:
        raise ValueError(f"weights must be float32 or float64, got {weights.dtype}")
    same_device(clients[0].ids, weights=weights)
