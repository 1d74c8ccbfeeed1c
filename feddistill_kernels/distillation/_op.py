"""``feddistill::distillation_*``: schemas, shapes for the compiler, gradient.  No arithmetic here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from feddistill_kernels._backend import load, operator, schema_like, watched
from feddistill_kernels._check import no_derivative_twice
from feddistill_kernels._native import empty_like


def _rows(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    log_tail: Tensor | None,
    labels: Tensor | None,
    scale: Tensor,
    vocab: int,
    kind: str,
    beta: float,
    temperature: float,
    kd: float,
    ce: float,
    backend: str,
    *,
    gradient: Tensor | None = None,
) -> Tensor:
    """``rows`` of a backend, see ``_reference.py``; the operators below take the arguments before ``*``."""
    loss: Tensor = load("distillation", backend, student, kind=kind).rows(
        student,
        teacher,
        ids,
        log_tail,
        labels,
        scale,
        gradient,
        vocab=vocab,
        kind=kind,
        beta=beta,
        temperature=temperature,
        kd=kd,
        ce=ce,
    )
    return loss


Rows = Callable[..., Tensor]
"""As ``_rows``."""
_COUNT = 13  # before ``*``


@operator("feddistill::distillation_loss", schema_like(_rows, "Tensor"))
def loss_rows(*arguments: Any) -> Tensor:
    """The loss of each row, ``[N]``; backward makes the gradient."""
    return _rows(*arguments)


@operator("feddistill::distillation_gradient", schema_like(_rows, "Tensor"))
def gradient_rows(student: Tensor, *rest: Any) -> Tensor:
    """The gradient of the sum of ``loss_rows``, ``[N, V]``."""
    gradient = empty_like(student)
    _rows(student, *rest, gradient=gradient)
    return gradient


@operator("feddistill::distillation_fused", schema_like(_rows, "(Tensor, Tensor)"))
def fused(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The sum of ``loss_rows``, and its gradient ``[N, V]`` made in the same sweep."""
    gradient = empty_like(student)
    return _rows(student, *rest, gradient=gradient).sum(), gradient


@operator(
    "feddistill::distillation_fused_", schema_like(_rows, "Tensor", mutates_args={"student"}), {"student"}
)
def fused_(student: Tensor, *rest: Any) -> Tensor:
    """The sum of ``loss_rows``; its gradient overwrites ``student``."""
    return _rows(student, *rest, gradient=student).sum()


@operator("feddistill::distillation_scaled")
def scaled(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """``gradient [N, V]`` times the scalar ``upstream``."""
    result = empty_like(gradient)
    load("distillation", backend, gradient).scale_into(gradient, upstream, result)
    return result


@operator("feddistill::distillation_rescale_", mutates_args={"gradient"})
def rescale_(gradient: Tensor, upstream: Tensor, backend: str) -> None:
    """``scaled`` in place, for any row stride."""
    if upstream.device.type == "cpu" and float(upstream) == 1:
        return
    plain = gradient.is_contiguous()
    load("distillation", backend if plain else "reference", gradient).scale_into(gradient, upstream, gradient)


@loss_rows.register_fake
def _(student: Tensor, teacher: Any, ids: Any, log_tail: Any, labels: Any, scale: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scale)


@gradient_rows.register_fake
def _(student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@fused.register_fake
def _(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return rest[4].new_empty(()), torch.empty_like(student, memory_format=torch.contiguous_format)


@fused_.register_fake
def _(student: Tensor, teacher: Any, ids: Any, log_tail: Any, labels: Any, scale: Tensor, *_: Any) -> Tensor:
    return scale.new_empty(())


@scaled.register_fake
def _(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _gradient_later(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    no_derivative_twice()
    *tensors, scale = ctx.saved_tensors
    return gradient_rows(*tensors, scale * upstream, *ctx.numbers), *[None] * (_COUNT - 1)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend = inputs[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or backward begins with zeros as large as the gradient


def _gradient_made(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:  # nothing above depends on the loss
        return (None,) * _COUNT
    no_derivative_twice()
    return scaled(ctx.saved_tensors[0], upstream, ctx.backend), *[None] * (_COUNT - 1)


loss_rows.register_autograd(_gradient_later, setup_context=_keep_inputs)
fused.register_autograd(_gradient_made, setup_context=_keep_gradient)


def each(student: Tensor, *rest: Any) -> Tensor:
    """``loss_rows``, without the dispatcher if nothing watches (``_backend.watched``)."""
    if watched(student, rest[0]):
        seen: Tensor = loss_rows.dispatched(student, *rest)
        return seen
    if not (student.requires_grad and torch.is_grad_enabled()):
        return _rows(student, *rest)
    loss: Tensor = _Each.apply(student, rest)  # type: ignore[no-untyped-call]  # torch types no apply
    return loss


def total(student: Tensor, *rest: Any) -> Tensor:
    """The loss of ``fused``, likewise."""
    if watched(student, rest[0]):
        seen: Tensor = fused.dispatched(student, *rest)[0]
        return seen
    return total_of(_rows, student, *rest)


def total_of(rows: Rows, student: Tensor, *rest: Any) -> Tensor:
    """The sum of what ``rows(student, *rest, gradient=...)`` returns, with the gradient that it writes."""
    loss: Tensor = _Total.apply(student, rest, rows)  # type: ignore[no-untyped-call]  # torch types no apply
    return loss


def total_in_place(rows: Rows | None, student: Tensor, *rest: Any) -> Tensor:
    """``total_of`` of ``rows``, or of these operators', with the gradient in the place of ``student``."""
    loss: Tensor = _InPlace.apply(student, rest, rows)  # type: ignore[no-untyped-call]  # torch types no apply
    return loss


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, rest: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(student, *rest[:5])
        ctx.numbers = rest[5:]
        return _rows(student, *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        no_derivative_twice()
        *tensors, scale = ctx.saved_tensors
        rows: Rows = _rows
        gradient = empty_like(tensors[0])
        rows(*tensors, scale * upstream, *ctx.numbers, gradient=gradient)
        return gradient, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, rest: tuple[Any, ...], rows: Rows) -> Tensor:
        gradient = empty_like(student)
        loss = rows(student, *rest, gradient=gradient)
        ctx.save_for_backward(gradient)
        ctx.backend = rest[-1]
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        no_derivative_twice()
        return times(ctx.saved_tensors[0], upstream, ctx.backend), None, None


def times(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """``scaled``, or the gradient itself if ``upstream`` is 1, reading it is free and no backward follows."""
    if watched(gradient, upstream):
        seen: Tensor = scaled.dispatched(gradient, upstream, backend)
        return seen
    # On a GPU reading it would be a sync; on a CPU it saves a pass over the gradient.
    if upstream.device.type == "cpu" and float(upstream) == 1 and not graph_is_kept():
        return gradient
    result: Tensor = scaled.direct(gradient, upstream, backend)
    return result


# A saved gradient that is needed again is not handed out: who receives it may write to it, as a leaf does
# that takes it for its own and adds the next one.  True outside of a backward pass.
graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


class _InPlace(torch.autograd.Function):
    """``fused_`` with a gradient: torch.library has none for an operator that writes its input."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, rest: tuple[Any, ...], rows: Rows | None) -> Tensor:
        memory = student.detach()  # autograd does not see the write, its version counter does
        loss: Tensor = fused_(memory, *rest) if rows is None else rows(memory, *rest, gradient=memory).sum()
        increment_version(memory)  # whatever the backend wrote it with
        ctx.save_for_backward(memory)
        ctx.backend = rest[-1]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        no_derivative_twice()
        (memory,) = ctx.saved_tensors
        if graph_is_kept():
            memory = memory.clone(memory_format=torch.contiguous_format)
        rescale_(memory, upstream, ctx.backend)
        increment_version(memory)
        return memory, None, None
