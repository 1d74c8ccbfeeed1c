"""Checks of the losses' settings, and masks and reductions as one factor a row."""

import torch
from torch import Tensor

from feddistill_kernels._check import bind, floating, one_of, positive_temperature, same_device
from feddistill_kernels._kinds import KINDS

REDUCTIONS = ("mean", "sum", "none")


def check_settings(
    rows: int, width: int, teacher_rows: int, vocab: int, kind: str, beta: float, temperature: float
) -> None:
    """Require a teacher that fits a student ``[rows, width]``, and settings in their ranges."""
    if teacher_rows != rows:
        raise ValueError(f"teacher has {teacher_rows} rows, student has {rows}")
    if vocab > width:
        raise ValueError(
            f"teacher's vocabulary is {vocab}, student has {width} columns; it needs at least as many"
        )
    one_of("kind", kind, KINDS)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    positive_temperature(temperature)


def check_labels(labels: Tensor | None, kd_weight: float, reduction: str) -> None:
    """Require labels if they have a share of the loss."""
    one_of("reduction", reduction, REDUCTIONS)
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight must be in [0, 1], got {kd_weight}")
    if kd_weight < 1 and labels is None:
        raise ValueError(f"kd_weight = {kd_weight} gives the labels a share of the loss, but labels is None")


def row_scale(
    student: Tensor, labels: Tensor | None, ignore_index: int, row_weight: Tensor | None, mean: bool
) -> Tensor:
    """The factor of each row's loss, 0 for a masked row, in the dtype of the result."""
    rows = student.shape[0]
    if row_weight is None:
        weight = 1 / max(1, rows) if mean and labels is None else 1.0
        scale = torch.full((rows,), weight, dtype=work_dtype(student), device=student.device)
    else:
        _check_rows(student, "row_weight", row_weight)
        floating(row_weight=row_weight)
        scale = row_weight.detach().to(work_dtype(student))
    if labels is not None:
        _check_rows(student, "labels", labels)
        if labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64, got {labels.dtype}")
        scale = scale.masked_fill(labels == ignore_index, 0.0)
    if mean and not (row_weight is None and labels is None):
        share = scale.sum()
        scale = scale / torch.where(share == 0, 1.0, share)
    return scale


def _check_rows(student: Tensor, name: str, vector: Tensor) -> None:
    (count,) = bind("N", **{name: vector})
    if count != student.shape[0]:
        raise ValueError(f"{name} has {count} rows, student has {student.shape[0]}")
    same_device(student, **{name: vector})


def lifted(student: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """``scale`` as far up as float16 needs it, and what to divide the loss by.

    A gradient made in the forward pass is not loss-scaled yet: divided by N, much of it would underflow
    float16 before an upstream gradient of 2^16 could save it.
    """
    if student.dtype != torch.float16:
        return scale, None
    most = scale.amax().clamp_min(torch.finfo(scale.dtype).tiny) if len(scale) else scale.new_ones(())
    return scale / most, 1 / most


def work_dtype(student: Tensor) -> torch.dtype:
    """The dtype of sums and of the loss."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32
