"""A rank's part of the loss as it reads on paper.

A backend has three functions, none of which speaks to another rank: ``statistics`` of its columns; from those
of whole rows ``sums`` of phi and psi over its columns, and ``gradient`` in them.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from feddistill_kernels._kinds import KINDS
from feddistill_kernels.vocabulary_parallel._statistics import (
    HARD,
    LABEL,
    OTHER,
    STUDENT,
    Loss,
    Shard,
    neutral,
)

CHUNK = 1 << 20
"""Entries worked on at once, as in ``distillation``."""


def statistics(shard: Shard, loss: Loss) -> Tensor:
    """Return ``[7, N]``, laid out as in ``_statistics``; what the loss does not need stays ``neutral``."""
    result = neutral(shard.scale)
    for chunk in _chunks(shard):
        part, z = chunk.part, chunk.student
        if loss.kd:
            result[STUDENT : STUDENT + 2, part] = _log_sum(z / loss.temperature)
            other = chunk.teacher if chunk.columns is None else _without(z, chunk.columns)
            result[OTHER : OTHER + 2, part] = _log_sum(other / loss.temperature)
        if loss.ce:
            result[HARD : HARD + 2, part] = _log_sum(z)
            assert chunk.label is not None
            result[LABEL, part] = _padded(z).gather(-1, chunk.label)[:, 0]
    return result


def sums(shard: Shard, loss: Loss, rows: Tensor) -> Tensor:
    """Return the sums of phi and psi ``[2, N]`` over these columns, or the kept ids among them."""
    result = torch.empty_like(rows[:2])
    for chunk in _chunks(shard):
        phi, psi, _ = _events(chunk, loss, rows[:, chunk.part])
        result[0, chunk.part], result[1, chunk.part] = phi.sum(-1), psi.sum(-1)
    return result


def gradient(shard: Shard, loss: Loss, rows: Tensor, slopes: Tensor, result: Tensor) -> None:
    """Write the gradient to ``result [N, V_r]``, which may be the student.

    ``slopes [2, N]`` are the sum of psi over whole rows, and psi of the tail.
    """
    for chunk in _chunks(shard):
        part, z = chunk.part, chunk.student
        dz = torch.zeros_like(z)
        if loss.kd:
            total, tail = slopes[:, part, None]  # [n, 1]
            _, psi, a = _events(chunk, loss, rows[:, part])
            if chunk.columns is not None:
                others = _without(z, chunk.columns) / loss.temperature
                psi = (tail * _log_softmax(others, rows[OTHER : OTHER + 2, part]).exp()).masked_fill(
                    others == -math.inf, 0.0
                ) + _scattered(psi, chunk.columns, z)
            dz += (loss.kd / loss.temperature) * (psi - a.exp() * total)
        if loss.ce:
            assert chunk.label is not None
            dz += loss.ce * _log_softmax(z, rows[HARD : HARD + 2, part]).exp()
            dz -= _scattered(torch.full_like(chunk.label, loss.ce, dtype=z.dtype), chunk.label, z)
        live = (chunk.scale != 0)[:, None] & chunk.real
        width = z.shape[1]
        result[part, :width] = torch.where(live, chunk.scale[:, None] * dz, 0.0).to(result.dtype)
        result[part, width:] = 0


class _Chunk(NamedTuple):
    part: slice
    student: Tensor  # [n, V_r] without the columns of a pad, or -inf there
    teacher: Tensor  # [n, V_r] or [n, K]
    real: Tensor  # [V_r], which columns are no pad
    columns: Tensor | None  # [n, K] of the kept ids; V_r, one past the last, for an id of another rank
    label: Tensor | None  # [n, 1] likewise
    scale: Tensor  # [n]


def _chunks(shard: Shard) -> Iterator[_Chunk]:
    n, width = shard.student.shape
    if shard.ids is None:
        width = shard.teacher.shape[1]
    step = max(1, CHUNK // max(1, width, shard.teacher.shape[1]))
    real = shard.first + torch.arange(width, device=shard.student.device) < shard.vocab
    for start in range(0, n, step):
        part = slice(start, start + step)
        scale = shard.scale[part]
        live = (scale != 0)[:, None]
        student = torch.where(live, shard.student[part, :width].to(scale.dtype), 0.0)
        yield _Chunk(
            part,
            student.masked_fill(~real, -math.inf),
            torch.where(live, shard.teacher[part].to(scale.dtype), 0.0),
            real,
            None if shard.ids is None else _columns(shard.ids[part], shard.first, width),
            None if shard.labels is None else _columns(shard.labels[part, None], shard.first, width),
            scale,
        )


def _events(chunk: _Chunk, loss: Loss, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phi and psi of these columns, or of the kept ids among them, and the student's log-probabilities."""
    a = _log_softmax(chunk.student / loss.temperature, rows[STUDENT : STUDENT + 2])
    if chunk.columns is None:
        b = _log_softmax(chunk.teacher / loss.temperature, rows[OTHER : OTHER + 2])
        phi, psi = KINDS[loss.kind](a, b, loss.beta)
    else:
        elsewhere = chunk.columns == a.shape[1]
        phi, psi = KINDS[loss.kind](_padded(a).gather(-1, chunk.columns), chunk.teacher, loss.beta)
        phi, psi = phi.masked_fill(elsewhere, 0.0), psi.masked_fill(elsewhere, 0.0)
    return phi, psi, a


def _log_sum(x: Tensor) -> Tensor:
    """The greatest of each row and the sum of e^(x - greatest), ``[2, n]``."""
    greatest = _padded(x).amax(-1)
    centre = torch.where(greatest == -math.inf, 0.0, greatest)
    return torch.stack([greatest, (x - centre[:, None]).exp().sum(-1)])


def _log_softmax(x: Tensor, whole: Tensor) -> Tensor:
    """Log-probabilities, of the two rows of statistics of whole rows."""
    return x - whole[0, :, None] - whole[1, :, None]


def _columns(ids: Tensor, first: Tensor, width: int) -> Tensor:
    column = ids.long() - first
    return torch.where((column >= 0) & (column < width), column, width)


def _padded(x: Tensor) -> Tensor:
    """With a column ``-inf`` for ids of other ranks; a rank may have no other column."""
    return torch.nn.functional.pad(x, (0, 1), value=-math.inf)


def _without(z: Tensor, columns: Tensor) -> Tensor:
    return _padded(z).scatter_(-1, columns, -math.inf)[:, :-1]


def _scattered(values: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(_padded(like)).scatter_(-1, columns, values)[:, :-1]
