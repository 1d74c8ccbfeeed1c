"""The loss in Triton: rows in programs, two or three sweeps over global memory.

A row that rules everything out, and one with a label or a kept id outside
the vocabulary, gives NaN in that row: to say more would be a host sync.
"""

import math
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._kinds import unknown_kind
from feddistill_kernels._native import in_rows
from feddistill_kernels._triton import launch, missing, power_of_two, processors
from feddistill_kernels.distillation import _triton_kernels as kernels
from feddistill_kernels.distillation._triton_kinds import KINDS

__all__ = ["cannot", "missing", "rows", "scale_into"]

WARPS = 8
"""Most warps of a program; a narrow row takes fewer."""
COLUMNS = {"skew_forward_kl": 4}
"""Columns that a thread works on at once, by kind; 8 if not listed: 55 registers for forward KL, 86 with 16.
Eight of ``skew_forward_kl`` spill on sm_100."""

MOST_PARTS = 64

_LOG2E = math.log2(math.e)


def cannot(device_type: str, *, kind: str) -> str | None:
    """Why it cannot run this call; ``None`` if it can."""
    return None if kind in KINDS else unknown_kind(kind, KINDS)


def rows(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    log_tail: Tensor | None,
    labels: Tensor | None,
    scale: Tensor,
    gradient: Tensor | None,
    *,
    vocab: int,
    kind: str,
    beta: float,
    temperature: float,
    kd: float,
    ce: float,
) -> Tensor:
    """As in ``_reference``; rows are read where they lie, whatever their stride."""
    n, width = student.shape
    loss = torch.empty_like(scale)
    if n == 0 or width == 0:
        return loss.zero_()
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    student, teacher, scale = in_rows(student), in_rows(teacher), scale.contiguous()
    dense = ids is None or log_tail is None
    kept, ids_stride, bits, words = 0, 0, scale, 0
    if ids is not None and log_tail is not None:
        ids, log_tail, kept = in_rows(ids), log_tail.contiguous(), ids.shape[1]
        ids_stride = ids.stride(0)
        if kd:
            words = -(-vocab // 32)
            bits = torch.zeros((n, words), dtype=torch.int32, device=student.device)
            launch(
                kernels.mark,
                (n,),
                ids,
                scale,
                bits,
                vocab,
                kept,
                ids_stride,
                words,
                warps=1,
                K=power_of_two(kept),
            )
    has_labels = bool(ce) and labels is not None
    written = (
        scale
        if gradient is None
        else gradient
        if in_rows(gradient) is gradient
        else torch.empty_like(student)
    )
    _launch_rows(
        student,
        teacher,
        scale if ids is None else ids,
        scale if log_tail is None else log_tail,
        bits,
        labels.contiguous() if has_labels and labels is not None else scale,
        scale,
        written,
        loss,
        vocab=vocab,
        kept=kept,
        words=words,
        ids_stride=ids_stride,
        settings=(kd, ce if has_labels else 0.0, kd / temperature, _LOG2E / temperature, beta),
        flags={"KIND": kind, "KD": bool(kd), "DENSE": dense, "CE": has_labels},
        wants_gradient=gradient is not None,
    )
    if gradient is not None and written is not gradient:
        gradient.copy_(written)
    return loss


def _launch_rows(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    log_tail: Tensor,
    bits: Tensor,
    labels: Tensor,
    scale: Tensor,
    gradient: Tensor,
    loss: Tensor,
    *,
    vocab: int,
    kept: int,
    words: int,
    ids_stride: int,
    settings: tuple[float, float, float, float, float],
    flags: dict[str, Any],
    wants_gradient: bool,
) -> None:
    """A program a row where rows are many, else as many programs a row as the GPU can take."""
    n, width = student.shape
    columns = 32 * COLUMNS.get(flags["KIND"], 8)
    block = min(power_of_two(width), columns * WARPS)
    warps = max(1, block // columns)
    blocks = -(-vocab // block)
    parts = min(blocks, MOST_PARTS, -(-2 * processors(student) // n))
    kd, ce, kd_slope, c, beta = settings
    strides = (student.stride(0), teacher.stride(0))
    gradient_stride = gradient.stride(0) if wants_gradient else 0
    k = power_of_two(kept + 1)
    if parts == 1:
        launch(
            kernels.whole_rows,
            (n,),
            *(
                student,
                teacher,
                ids,
                log_tail,
                bits,
                labels,
                scale,
                gradient,
                loss,
                vocab,
                width,
                kept,
                words,
            ),
            *(*strides, ids_stride, gradient_stride, kd, ce, kd_slope, c, beta),
            warps=warps,
            **flags,
            GRADIENT=wants_gradient,
            K=k,
            B=block,
        )
        return
    span = -(-blocks // parts) * block
    parts = -(-vocab // span)
    many = power_of_two(parts)
    partials, sums = (scale.new_empty((n, parts, size)) for size in (kernels.FIELDS, 2))
    is_kd, is_dense, has_labels, kind = (flags[name] for name in ("KD", "DENSE", "CE", "KIND"))
    shape: dict[str, Any] = {"warps": warps, "B": block}
    launch(
        kernels.part_statistics,
        (n, parts),
        *(student, teacher, bits, labels, scale, partials, vocab, span, words, *strides, c),
        **shape,
        KD=is_kd,
        DENSE=is_dense,
        CE=has_labels,
    )
    at_kept = scale
    if is_kd and is_dense and not (kind == "forward_kl" and wants_gradient):
        launch(
            kernels.part_sums,
            (n, parts),
            *(student, teacher, scale, partials, sums, vocab, span, *strides, c, beta),
            **shape,
            KIND=kind,
            PARTS=many,
        )
    elif is_kd and not is_dense:
        if wants_gradient:
            at_kept = scale.new_empty((n, kept))
        launch(
            kernels.row_events,
            (n,),
            *(student, teacher, ids, log_tail, labels, scale, partials, sums, at_kept, vocab, kept, parts),
            *(*strides, ids_stride, ce, kd_slope, c, beta),
            warps=1,
            KIND=kind,
            CE=has_labels,
            GRADIENT=wants_gradient,
            PARTS=many,
            K=k,
        )
    if wants_gradient:
        launch(
            kernels.part_slopes,
            (n, parts),
            *(
                student,
                teacher,
                ids,
                labels,
                scale,
                partials,
                sums,
                at_kept,
                gradient,
                vocab,
                width,
                span,
                kept,
            ),
            *(*strides, ids_stride, gradient_stride, ce, kd_slope, c, beta),
            **shape,
            **(flags if is_dense else flags | {"KIND": ""}),  # the events have been through it
            PARTS=many,
            K=k,
        )
    launch(
        kernels.finish,
        (n,),
        *(labels, scale, partials, sums, loss, vocab, parts, kd, ce, c),
        warps=1,
        KD=is_kd,
        CE=has_labels,
        PARTS=many,
    )


def scale_into(gradient: Tensor, upstream: Tensor, result: Tensor) -> None:
    """As in ``_reference``."""
    assert gradient.is_contiguous()
    assert result.is_contiguous()
    n = gradient.numel()
    launch(kernels.scaled, (-(-n // 2048),), gradient, upstream, result, n, warps=4, B=2048)
