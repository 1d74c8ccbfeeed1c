"""Top-k of a softmax in Triton: candidates of each part of a row, then the best of a row's.

A row that rules everything out gives NaN in that row: to say more would be a host sync.
"""

import math

import torch
from torch import Tensor

from feddistill_kernels._native import in_rows
from feddistill_kernels._triton import launch, missing, power_of_two, processors
from feddistill_kernels.topk import _triton_kernels as kernels

__all__ = ["cannot", "compress", "missing", "sorting_warps"]

MOST = 1024
"""Largest k: those kept are sorted in registers."""
MOST_IN_ONE_READ = 128
"""Above, the k best groups are too often not among four a lane, so digits are counted at once."""

SHORT = 4096
"""Columns of a row that is sorted as it is."""
LANES = 256
WARPS = 8
BLOCK = 1024
"""Columns counted at once."""
MOST_PARTS = 16
SCRATCH = 1 << 25
"""Bytes of candidates at once, at the most."""

_LOG2E = math.log2(math.e)
_DIGITS = {torch.float32: 4, torch.float16: 3, torch.bfloat16: 2}
_GROUP_BYTES = 64


def cannot(device_type: str, k: int) -> str | None:
    """Why it cannot run this call; ``None`` if it can."""
    return f"it sorts at most {MOST} entries a row, k is {k}" if k > MOST else None


def sorting_warps(lanes: int, kept: int) -> int:
    """Four keys a thread; 16 where so many are ``kept`` that 32 warps have too few registers for it."""
    return max(1, lanes // 128 if kept <= MOST_IN_ONE_READ else min(8, lanes // 256))


def compress(logits: Tensor, k: int, temperature: float, id_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in ``_reference``; rows are read where they lie, whatever their stride."""
    n, vocab = logits.shape
    logits = in_rows(logits)
    ids = torch.empty((n, k), dtype=torch.int32, device=logits.device)
    log_probs = torch.empty((n, k), dtype=torch.float32, device=logits.device)
    log_tail = torch.empty(n, dtype=torch.float32, device=logits.device)
    c, K = _LOG2E / temperature, max(2, power_of_two(k))
    if vocab <= SHORT:
        width = max(K, power_of_two(vocab))
        launch(
            kernels.short,
            (n,),
            *(logits, ids, log_probs, log_tail, vocab, k, logits.stride(0), c),
            warps=sorting_warps(width, K),
            ID_ORDER=id_order,
            K=K,
            P=width,
        )
        return ids, log_probs, log_tail
    width = _GROUP_BYTES // 4 // logits.element_size()
    fast = k <= MOST_IN_ONE_READ
    slots = 2 * K if fast else K
    block = LANES * 4 * width
    blocks = -(-vocab // block)
    parts = min(blocks, MOST_PARTS, max(1, SHORT // slots), -(-2 * processors(logits) // max(1, n)))
    span = -(-blocks // parts) * block
    parts = -(-vocab // span)
    step = max(1, SCRATCH // (parts * slots * 8))
    keys = torch.empty((min(n, step), parts, slots), dtype=torch.int64, device=logits.device)
    sums = torch.empty((min(n, step), parts, 2), dtype=torch.float32, device=logits.device)
    for start in range(0, n, step):
        some = slice(start, start + step)
        rows = min(step, n - start)
        where = (keys, sums, vocab, span)
        if fast:
            launch(
                kernels.by_groups,
                (rows, parts),
                *(logits[some], *where, logits.stride(0), c),
                warps=WARPS,
                K=K,
                SLOTS=slots,
                LANES=LANES,
                WIDTH=width,
                NARROW=logits.element_size() == 2 and span <= 8192 * 4 * width,
            )
        launch(
            kernels.by_digits,
            (rows, parts),
            *(logits[some], *where, k, logits.stride(0), c),
            warps=WARPS,
            ALL=not fast,
            SLOTS=slots,
            DIGITS=_DIGITS[logits.dtype],
            B=BLOCK,
        )
        candidates = max(2, power_of_two(parts * slots))
        launch(
            kernels.merged,
            (rows,),
            *(keys, sums, ids[some], log_probs[some], log_tail[some], k, parts, slots, c),
            warps=sorting_warps(candidates, K),
            ID_ORDER=id_order,
            K=K,
            PARTS=max(2, power_of_two(parts)),
            P=candidates,
        )
    return ids, log_probs, log_tail
