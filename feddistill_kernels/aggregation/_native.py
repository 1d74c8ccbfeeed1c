"""Aggregation of compressed answers through ``_C``: C++ on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._check import distinct_ids, empty_row
from feddistill_kernels._native import DTYPES, cpu_only, library
from feddistill_kernels.aggregation._reference import krum_weights, mixing_weights
from feddistill_kernels.aggregation._rules import Settings

_IDS = 2  # csrc/aggregation.h: NoResult::Reason

# csrc/aggregation.h: enum Rule.  The median is a trimmed mean, and Krum a mean of those that it chose.
RULES = {
    "mean_probs": 0,
    "mean_logits": 1,
    "median": 2,
    "trimmed_mean": 2,
    "mean_around_median": 3,
    "geometric_median": 4,
    "krum": 1,
}


def missing(device_type: str) -> str | None:
    """Why it cannot run there."""
    return cpu_only(device_type)


def aggregate(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    weights: Tensor | None,
    k: int,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and log tail mass; ``missing[c] [N]`` stands for ids not in ``ids[c]``."""
    n, count = ids[0].shape[0], len(ids)
    tensors = [
        (_dense_rows(i), _dense_rows(x), m.float().contiguous())
        for i, x, m in zip(ids, log_probs, missing, strict=True)
    ]
    answers = [
        (i.data_ptr(), x.data_ptr(), m.data_ptr(), i.stride(0), x.stride(0), i.shape[1], DTYPES[x.dtype])
        for i, x, m in tensors
    ]
    mixing = None
    if settings.mix is not None:
        mixing = mixing_weights(_distances(answers, n, vocab, None), settings.mix).float()
    if settings.rule == "krum":
        weights = krum_weights(_distances(answers, n, vocab, mixing), settings.byzantine, settings.keep)
    if weights is None:
        weights = torch.ones(count, dtype=torch.float32, device="cpu")
    shares = (weights / weights.sum(0)).float().contiguous()  # [C] or [C, N]
    out_ids = torch.empty((n, k), dtype=torch.int32, device="cpu")
    out_log_probs = torch.empty((n, k), dtype=torch.float32, device="cpu")
    out_log_tail = torch.empty(n, dtype=torch.float32, device="cpu")
    row, reason = library().aggregate_cpu(
        answers,
        n,
        vocab,
        0 if mixing is None else mixing.data_ptr(),
        RULES[settings.rule],
        shares.data_ptr(),
        shares.stride(0),
        shares.dim() - 1,
        settings.trim,
        settings.keep,
        settings.tolerance,
        settings.max_iterations,
        k,
        out_ids.data_ptr(),
        out_log_probs.data_ptr(),
        out_log_tail.data_ptr(),
        torch.get_num_threads(),
    )
    if reason == _IDS:
        for client, kept in enumerate(ids):
            distinct_ids(f"clients[{client}]", kept[row : row + 1], vocab, start=row)
    if reason:
        raise empty_row("the aggregate's", row)
    return out_ids, out_log_probs, out_log_tail


def _dense_rows(x: Tensor) -> Tensor:
    """``x [N, K]`` with neighbours in a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _distances(answers: Sequence[tuple[int, ...]], rows: int, vocab: int, mixing: Tensor | None) -> Tensor:
    """Squared distances ``[C, C]``, float64, between centred answers, over all rows."""
    distances = torch.empty((len(answers), len(answers)), dtype=torch.float64, device="cpu")
    mixing_at = 0 if mixing is None else mixing.data_ptr()
    library().answer_distances_cpu(
        answers, rows, vocab, mixing_at, distances.data_ptr(), torch.get_num_threads()
    )
    return distances
