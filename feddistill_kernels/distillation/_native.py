"""The loss through ``_C``: C++ on the CPU, CUDA C++ on a GPU."""

from functools import cache

import torch
from torch import Tensor

from feddistill_kernels._check import empty_row, label_outside, wrong_ids
from feddistill_kernels._kinds import unknown_kind
from feddistill_kernels._native import DTYPES, in_rows, library, matrix, missing, on_stream

__all__ = ["cannot", "missing", "rows", "scale_into"]

_EMPTY_STUDENT, _EMPTY_TEACHER, _LABEL, _IDS = 1, 2, 3, 4  # csrc/distillation.h: Refusal::Reason
_NOTHING = (0, 0, 0)


@cache
def kinds() -> dict[str, int]:
    """The kinds that the compiled module knows, with their numbers in it (csrc/distillation.h)."""
    return {kind: number for number, kind in enumerate(library().kinds)}


def cannot(device_type: str, *, kind: str) -> str | None:
    """Why it cannot run this call; ``None`` if it can."""
    return None if kind in kinds() else unknown_kind(kind, kinds())


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
    student, teacher, scale = in_rows(student), in_rows(_known(teacher)), scale.contiguous()
    loss = torch.empty_like(scale)
    kept = tail = target = _NOTHING
    if ids is not None and log_tail is not None:
        ids, log_tail = in_rows(ids), _known(log_tail).contiguous()
        kept = ids.data_ptr(), ids.stride(0), 0
        tail = log_tail.data_ptr(), 1, DTYPES[log_tail.dtype]
    if labels is not None:
        labels = labels.contiguous()
    written = gradient
    if gradient is not None:
        written = gradient if in_rows(gradient) is gradient else torch.empty_like(student)
        target = matrix(written)
    task = (
        n,
        vocab,
        width,
        matrix(student),
        matrix(teacher),
        kept,
        tail,
        teacher.shape[1],
        0 if labels is None else labels.data_ptr(),
        scale.data_ptr(),
        target,
        loss.data_ptr(),
        kinds()[kind],
        beta,
        temperature,
        kd,
        ce,
    )
    if student.is_cuda:  # rows without a loss get NaN there: to know which would be a sync
        with on_stream(student) as stream:
            library().distillation_cuda(*task, stream)
        row, reason = -1, 0
    else:
        row, reason = library().distillation_cpu(*task, torch.get_num_threads())
    if reason == _LABEL:
        assert labels is not None
        raise label_outside(row, int(labels[row]), vocab)
    if reason == _IDS:
        assert ids is not None
        raise wrong_ids("teacher", row, ids[row], vocab)
    if reason:
        raise empty_row("student" if reason == _EMPTY_STUDENT else "teacher", row)
    if gradient is not None and written is not None and written is not gradient:
        gradient.copy_(written)
    return loss


def _known(x: Tensor) -> Tensor:
    """``x`` in float32 if it is float64: only the reference takes a float64 student."""
    return x if x.dtype in DTYPES else x.float()


def scale_into(gradient: Tensor, upstream: Tensor, result: Tensor) -> None:
    """As in ``_reference``."""
    assert gradient.is_contiguous()
    assert result.is_contiguous()
    flat = gradient.data_ptr(), gradient.numel(), DTYPES[gradient.dtype]
    if gradient.is_cuda:
        factor = upstream.to(torch.float32)
        with on_stream(gradient) as stream:
            library().scale_cuda(*flat, factor.data_ptr(), result.data_ptr(), stream)
    else:
        library().scale_cpu(*flat, float(upstream), result.data_ptr(), torch.get_num_threads())
