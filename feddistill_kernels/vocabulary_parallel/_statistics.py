"""Statistics of a row: each rank's over its own columns, and their combination for the whole row.

The same for every backend: they make and read these tensors, and only ``_op`` sends them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from feddistill_kernels._check import NO_ID, empty_row
from feddistill_kernels._kinds import KINDS

# Rows of the statistics [7, N].  The first three begin two: the greatest x and the sum of e^(x - greatest),
# or, once all ranks' are put together, its logarithm.
STUDENT = 0  # x = student / T
OTHER = 2  # x = teacher / T; with a TopK teacher, student / T where the id was not kept
HARD = 4  # x = student
LABEL = 6  # the label's logit; -inf on the ranks that do not have it
COUNT = 7


class Shard(NamedTuple):
    """The inputs of one rank: its columns of the logits, and what is the same on all ranks."""

    student: Tensor  # [N, V_r]
    teacher: Tensor  # [N, <= V_r] logits, or all of [N, K] log-probabilities
    ids: Tensor | None  # [N, K] of the whole vocabulary
    log_tail: Tensor | None  # [N]
    labels: Tensor | None  # [N] of the whole vocabulary
    scale: Tensor  # [N], as in ``distillation``
    first: Tensor  # the id of column 0; a tensor, as only the device knows it
    vocab: Tensor  # the size of the whole vocabulary, likewise


class Loss(NamedTuple):
    """``kd D + ce CE``, as in ``distillation``."""

    kind: str
    beta: float
    temperature: float
    kd: float
    ce: float


def neutral(scale: Tensor) -> Tensor:
    """Statistics ``[7, N]`` of no columns."""
    result = scale.new_full((COUNT, len(scale)), -math.inf)
    for row in (STUDENT, OTHER, HARD):
        result[row + 1] = 0
    return result


def combined(gathered: Tensor) -> Tensor:
    """The statistics of whole rows ``[7, N]``, of every rank's ``[R, 7, N]``."""
    result = gathered.amax(0)
    for row in (STUDENT, OTHER, HARD):
        greatest, sums = gathered[:, row], gathered[:, row + 1]
        shares = torch.where(greatest == -math.inf, sums, sums * (greatest - result[row]).exp())
        result[row + 1] = shares.sum(0).log()
    return result


def rows_with_a_choice(shard: Shard, rows: Tensor, loss: Loss) -> None:
    """Raise for a row that rules every entry out, on every rank alike.  On the CPU only."""
    if rows.device.type != "cpu":
        return
    looked_at = {"student": rows[STUDENT if loss.kd else HARD]}
    if loss.kd and shard.ids is None:
        looked_at["teacher"] = rows[OTHER]
    for name, greatest in looked_at.items():
        empty = (greatest == -math.inf) & (shard.scale != 0)
        if empty.any():
            raise empty_row(name, int(empty.to(torch.uint8).argmax()))


def divergence(sums: Tensor, rows: Tensor, shard: Shard, loss: Loss) -> tuple[Tensor, Tensor]:
    """The divergence ``[N]``, and slopes ``[2, N]``: the sum of psi and the tail's, of all ranks' sums."""
    if shard.log_tail is None:
        return sums[0], torch.stack([sums[1], torch.zeros_like(sums[1])])
    a = (rows[OTHER] - rows[STUDENT]) + (rows[OTHER + 1] - rows[STUDENT + 1])
    b = torch.where(shard.scale != 0, shard.log_tail.to(a.dtype), 0.0)
    phi, psi = KINDS[loss.kind](a, b, loss.beta)
    if shard.ids is not None:
        # No rank has it; on a device that is not checked the row must be NaN.
        stray = ((shard.ids < NO_ID) | (shard.ids >= shard.vocab)).any(-1)
        phi, psi = phi.masked_fill(stray, math.nan), psi.masked_fill(stray, math.nan)
    return sums[0] + phi, torch.stack([sums[1] + psi, psi])


def cross_entropy(rows: Tensor) -> Tensor:
    """Cross-entropy of each row with its label, at T = 1."""
    return rows[HARD + 1] - (rows[LABEL] - rows[HARD])
