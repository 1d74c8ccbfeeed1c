"""Top-k of a softmax through ``_C``: C++ on the CPU."""

import torch
from torch import Tensor

from feddistill_kernels._check import empty_row
from feddistill_kernels._native import cpu_only as missing
from feddistill_kernels._native import in_rows, library, matrix

__all__ = ["compress", "missing"]


def compress(logits: Tensor, k: int, temperature: float, id_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in ``_reference``; rows are read where they lie, whatever their stride."""
    n, vocab = logits.shape
    logits = in_rows(logits)
    ids = torch.empty((n, k), dtype=torch.int32)
    log_probs, log_tail = torch.empty((n, k)), torch.empty(n)
    row = library().topk_cpu(
        n,
        vocab,
        k,
        matrix(logits),
        temperature,
        id_order,
        ids.data_ptr(),
        log_probs.data_ptr(),
        log_tail.data_ptr(),
        torch.get_num_threads(),
    )
    if row >= 0:
        raise empty_row("logits", row)
    return ids, log_probs, log_tail
