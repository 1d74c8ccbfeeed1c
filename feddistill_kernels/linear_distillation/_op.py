"""``feddistill::linear_distillation``: schema, shapes for the compiler, gradient.  No arithmetic here."""

from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._backend import load
from feddistill_kernels.distillation._op import times

_TENSORS = 11  # hidden, weight, bias, six of the teacher, labels, scale
_NUMBERS = 8


@torch.library.custom_op("feddistill::linear_distillation", mutates_args=())
def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    ids: Tensor | None,
    log_tail: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    scale: Tensor,
    vocab: int,
    kind: str,
    beta: float,
    temperature: float,
    kd: float,
    ce: float,
    workspace_bytes: int,
    backend: str,
) -> Tensor:
    """The loss of each row, ``[N]``; its gradients are made when they are asked for."""
    tensors = (hidden, weight, bias, teacher, ids, log_tail, teacher_hidden, teacher_weight, teacher_bias)
    numbers = (vocab, kind, beta, temperature, kd, ce, workspace_bytes, backend)
    loss: Tensor = _run((*tensors, labels, scale), numbers, [False] * 3)[0]
    return loss


@torch.library.custom_op("feddistill::linear_distillation_gradients", mutates_args=())
def linear_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    ids: Tensor | None,
    log_tail: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    scale: Tensor,
    vocab: int,
    kind: str,
    beta: float,
    temperature: float,
    kd: float,
    ce: float,
    workspace_bytes: int,
    backend: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The sum of ``linear_rows``, and its gradients to hidden, weight and bias; empty where not wanted."""
    tensors = (hidden, weight, bias, teacher, ids, log_tail, teacher_hidden, teacher_weight, teacher_bias)
    numbers = (vocab, kind, beta, temperature, kd, ce, workspace_bytes, backend)
    loss, *gradients = _run((*tensors, labels, scale), numbers, wanted)
    return [loss.sum(), *(hidden.new_empty(0) if g is None else g for g in gradients)]


def _run(tensors: tuple[Any, ...], numbers: tuple[Any, ...], wanted: list[bool]) -> list[Any]:
    names = ("vocab", "kind", "beta", "temperature", "kd", "ce", "workspace_bytes")
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if want and x is not None else None
        for x, want in zip(tensors[:3], wanted, strict=True)
    ]
    module = load("linear_distillation", numbers[-1], tensors[0])
    loss = module.rows(*tensors, *gradients, **dict(zip(names, numbers[:-1], strict=True)))
    return [loss, *gradients]


@linear_rows.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(rest[_TENSORS - 2])


@linear_gradients.register_fake
def _(hidden: Tensor, *rest: Any) -> list[Tensor]:
    inputs, wanted = (hidden, *rest[:2]), rest[-1]
    gradients = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if want and x is not None else None
        for x, want in zip(inputs, wanted, strict=True)
    )
    loss = rest[_TENSORS - 2].new_empty(())
    return [loss, *(hidden.new_empty(0) if g is None else g for g in gradients)]


def each(*arguments: Any) -> Tensor:
    """``linear_rows`` with a gradient, made again in backward."""
    loss: Tensor = _Each.apply(*arguments)  # type: ignore[no-untyped-call]  # torch types no apply
    return loss


def total(*arguments: Any) -> Tensor:
    """Its sum, with gradients made in the same pass."""
    loss: Tensor = _Total.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def _wanted(tensors: tuple[Any, ...]) -> list[bool]:
    return [x is not None and x.requires_grad for x in tensors[:3]]


def _gradients(tensors: tuple[Any, ...], numbers: tuple[Any, ...], wanted: list[bool]) -> list[Tensor]:
    results: list[Tensor] = linear_gradients(*tensors, *numbers, wanted)
    return results


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, ctx.numbers = arguments[:_TENSORS], arguments[_TENSORS:]
        ctx.wanted = ctx.needs_input_grad[:3]
        ctx.save_for_backward(*tensors)
        loss: Tensor = linear_rows(*arguments)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, scale = ctx.saved_tensors
        wanted = list(ctx.wanted)
        _, *gradients = _gradients((*tensors, scale * upstream), ctx.numbers, wanted)
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *_NOTHING


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, numbers = arguments[:_TENSORS], arguments[_TENSORS:]
        ctx.wanted = list(ctx.needs_input_grad[:3])
        loss, *gradients = _gradients(tensors, numbers, ctx.wanted)
        ctx.save_for_backward(*gradients)
        ctx.backend = numbers[-1]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            times(g.view(-1, g.shape[-1]), upstream, ctx.backend).view_as(g) if want else None
            for g, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        )
        return *scaled, *_NOTHING


_NOTHING = (None,) * (_TENSORS - 3 + _NUMBERS)
