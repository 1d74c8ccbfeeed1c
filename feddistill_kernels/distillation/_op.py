"""``feddistill::distillation_*``: schemas, shapes for the compiler, gradient.  No arithmetic here."""

from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._backend import load, watched
from feddistill_kernels._check import no_derivative_twice
from feddistill_kernels._native import empty_like

# The operators take what `rows` of a backend takes, as plain tensors and numbers; see `_reference.py`.


@torch.library.custom_op("feddistill::distillation_loss", mutates_args=())
def loss_rows(
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
) -> Tensor:
    """The loss of each row, ``[N]``; its gradient is made when it is asked for."""
    return _rows(
        None, student, teacher, ids, log_tail, labels, scale, vocab, kind, beta, temperature, kd, ce, backend
    )


@torch.library.custom_op("feddistill::distillation_gradient", mutates_args=())
def gradient_rows(
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
) -> Tensor:
    """The gradient of the sum of ``loss_rows``, ``[N, V]``."""
    gradient = empty_like(student)
    _rows(
        gradient,
        student,
        teacher,
        ids,
        log_tail,
        labels,
        scale,
        vocab,
        kind,
        beta,
        temperature,
        kd,
        ce,
        backend,
    )
    return gradient


@torch.library.custom_op("feddistill::distillation_fused", mutates_args=())
def fused(
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
) -> tuple[Tensor, Tensor]:
    """The sum of ``loss_rows``, and its gradient ``[N, V]`` made in the same sweep."""
    gradient = empty_like(student)
    loss = _rows(
        gradient,
        student,
        teacher,
        ids,
        log_tail,
        labels,
        scale,
        vocab,
        kind,
        beta,
        temperature,
        kd,
        ce,
        backend,
    )
    return loss.sum(), gradient


@torch.library.custom_op("feddistill::distillation_fused_", mutates_args={"student"})
def fused_(
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
) -> Tensor:
    """The sum of ``loss_rows``; its gradient takes the place of ``student``."""
    loss = _rows(
        student,
        student,
        teacher,
        ids,
        log_tail,
        labels,
        scale,
        vocab,
        kind,
        beta,
        temperature,
        kd,
        ce,
        backend,
    )
    return loss.sum()


@torch.library.custom_op("feddistill::distillation_scaled", mutates_args=())
def scaled(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """``gradient [N, V]`` times the scalar ``upstream``."""
    result = empty_like(gradient)
    load("distillation", backend, gradient).scale_into(gradient, upstream, result)
    return result


def _rows(
    gradient: Tensor | None,
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
) -> Tensor:
    loss: Tensor = load("distillation", backend, student).rows(
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


@loss_rows.register_fake
def _(
    student: Tensor, teacher: Tensor, ids: Any, log_tail: Any, labels: Any, scale: Tensor, *rest: Any
) -> Tensor:
    return torch.empty_like(scale)


@gradient_rows.register_fake
def _(student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@fused.register_fake
def _(
    student: Tensor, teacher: Tensor, ids: Any, log_tail: Any, labels: Any, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return scale.new_empty(()), torch.empty_like(student, memory_format=torch.contiguous_format)


@fused_.register_fake
def _(
    student: Tensor, teacher: Tensor, ids: Any, log_tail: Any, labels: Any, scale: Tensor, *rest: Any
) -> Tensor:
    return scale.new_empty(())


@scaled.register_fake
def _(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.vocab, ctx.kind, ctx.beta, ctx.temperature, ctx.kd, ctx.ce, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient_later(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    no_derivative_twice()
    *tensors, scale = ctx.saved_tensors
    gradient = gradient_rows(
        *tensors,
        scale * upstream,
        ctx.vocab,
        ctx.kind,
        ctx.beta,
        ctx.temperature,
        ctx.kd,
        ctx.ce,
        ctx.backend,
    )
    return gradient, *[None] * 12


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend = inputs[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or backward begins with zeros as large as the gradient


def _gradient_made(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:  # nobody asks for it
        return (None,) * 13
    no_derivative_twice()
    return scaled(ctx.saved_tensors[0], upstream, ctx.backend), *[None] * 12


loss_rows.register_autograd(_gradient_later, setup_context=_keep_inputs)
fused.register_autograd(_gradient_made, setup_context=_keep_gradient)


def each(student: Tensor, *rest: Any) -> Tensor:
    """``loss_rows``, without the dispatcher where nobody watches."""
    if watched(student, rest[0]):
        seen: Tensor = loss_rows(student, *rest)
        return seen
    if not (student.requires_grad and torch.is_grad_enabled()):
        return _rows(None, student, *rest)
    loss: Tensor = _Each.apply(student, rest)  # type: ignore[no-untyped-call]  # torch types no apply
    return loss


def total(student: Tensor, *rest: Any) -> Tensor:
    """``fused`` likewise."""
    if watched(student, rest[0]):
        seen: Tensor = fused(student, *rest)[0]
        return seen
    loss: Tensor = _Total.apply(student, rest)  # type: ignore[no-untyped-call]  # torch types no apply
    return loss


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, rest: tuple[Any, ...]) -> Tensor:
        *tensors, scale = rest[:5]
        ctx.save_for_backward(student, *tensors, scale)
        ctx.numbers = rest[5:]
        return _rows(None, student, *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        no_derivative_twice()
        student, teacher, ids, log_tail, labels, scale = ctx.saved_tensors
        gradient = empty_like(student)
        _rows(gradient, student, teacher, ids, log_tail, labels, scale * upstream, *ctx.numbers)
        return gradient, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, rest: tuple[Any, ...]) -> Tensor:
        gradient = empty_like(student)
        loss = _rows(gradient, student, *rest)
        ctx.save_for_backward(gradient)
        ctx.backend = rest[-1]
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        no_derivative_twice()
        return times(ctx.saved_tensors[0], upstream, ctx.backend), None


def times(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """``scaled``, or the gradient itself where there is nothing to scale and looking is free."""
    if watched(gradient, upstream):
        seen: Tensor = scaled(gradient, upstream, backend)
        return seen
    # On a GPU to look at it would be a sync; here it saves a pass over the gradient.
    if upstream.device.type == "cpu" and float(upstream) == 1:
        return gradient
    result = empty_like(gradient)
    load("distillation", backend, gradient).scale_into(gradient, upstream, result)
    return result


class FusedInPlace(torch.autograd.Function):
    """``fused_`` with a gradient, which torch.library has not for an operator that writes its input."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, rest: tuple[Any, ...]) -> Tensor:
        """Overwrite ``student``, behind autograd's back but not behind its version counter."""
        memory = student.detach()
        loss: Tensor = fused_(memory, *rest)
        ctx.save_for_backward(memory)
        ctx.backend = rest[-1]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient where it lies; this moves the version on, so a second backward is refused."""
        no_derivative_twice()
        (memory,) = ctx.saved_tensors
        _rescale(memory, upstream, ctx.backend)
        return memory, None


@torch.library.custom_op("feddistill::distillation_rescale_", mutates_args={"gradient"})
def _rescale(gradient: Tensor, upstream: Tensor, backend: str) -> None:
    """``scaled`` in place, whatever the rows' stride."""
    if upstream.device.type == "cpu" and float(upstream) == 1:
        return
    plain = gradient.is_contiguous()
    load("distillation", backend if plain else "reference", gradient).scale_into(gradient, upstream, gradient)
