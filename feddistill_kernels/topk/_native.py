"""Top-k of a softmax through ``_C``: C++ on the CPU, CUDA C++ on a GPU."""

import torch
from torch import Tensor

from feddistill_kernels._check import empty_row
from feddistill_kernels._native import in_rows, library, matrix, missing, on_stream

__all__ = ["cannot", "compress", "missing"]

MOST_CUDA_KEPT = 2048
"""csrc/topk.h: kMostCudaKept."""


def cannot(device_type: str, k: int) -> str | None:
    """Why it cannot run this call; ``None`` if it can."""
    if device_type != "cuda" or k <= MOST_CUDA_KEPT:
        return None
    return f"on cuda it keeps up to {MOST_CUDA_KEPT} entries a row, k is {k}"


def compress(logits: Tensor, k: int, temperature: float, id_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in ``_reference``; rows are read where they lie, whatever their stride."""
    n, vocab = logits.shape
    device = logits.device
    logits = in_rows(logits)
    ids = torch.empty((n, k), dtype=torch.int32, device=device)
    log_probs = torch.empty((n, k), dtype=torch.float32, device=device)
    log_tail = torch.empty(n, dtype=torch.float32, device=device)
    results = ids.data_ptr(), log_probs.data_ptr(), log_tail.data_ptr()
    task = n, vocab, k, matrix(logits), temperature, id_order, *results
    if device.type == "cuda":
        with on_stream(logits) as stream:
            library().topk_cuda(*task, stream)
    elif (row := library().topk_cpu(*task, torch.get_num_threads())) >= 0:
        raise empty_row("logits", row)
    return ids, log_probs, log_tail
