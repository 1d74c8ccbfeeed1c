"""``feddistill::linear_distillation``: schema, shapes for the compiler, gradient.  No arithmetic here."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._backend import load
from feddistill_kernels._check import no_derivative_twice
from feddistill_kernels.distillation._op import times

_TENSORS = 11  # hidden, weight, bias, six of the teacher, labels, scale
_NUMBERS = 9


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
    masked: bool,
    workspace_bytes: int,
    backend: str,
) -> Tensor:
    """The loss of each row, ``[N]``; its gradients are made when they are asked for."""
    tensors = (hidden, weight, bias, teacher, ids, log_tail, teacher_hidden, teacher_weight, teacher_bias)
    numbers = (vocab, kind, beta, temperature, kd, ce, masked, workspace_bytes, backend)
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
    masked: bool,
    workspace_bytes: int,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of ``linear_rows``, and its gradients to hidden, weight and bias; empty where not wanted."""
    tensors = (hidden, weight, bias, teacher, ids, log_tail, teacher_hidden, teacher_weight, teacher_bias)
    numbers = (vocab, kind, beta, temperature, kd, ce, masked, workspace_bytes, backend)
    loss, *gradients = _run((*tensors, labels, scale), numbers, wanted)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return loss.sum(), d_hidden, d_weight, d_bias


def _run(tensors: tuple[Any, ...], numbers: tuple[Any, ...], wanted: list[bool]) -> list[Any]:
    names = ("vocab", "kind", "beta", "temperature", "kd", "ce", "masked", "workspace_bytes")
    gradients = [
        _memory(x, summed=place > 0) if want and x is not None else None
        for place, (x, want) in enumerate(zip(tensors[:3], wanted, strict=True))
    ]
    module = load("linear_distillation", numbers[-1], tensors[0])
    # The products are of the dtype of what they multiply, as documented, and not of autocast's.
    with torch.autocast(tensors[0].device.type, enabled=False):
        loss = module.rows(*tensors, *gradients, **dict(zip(names, numbers[:-1], strict=True)))
    return [loss, *gradients]


def _memory(x: Tensor, summed: bool) -> Tensor:
    """For the gradient to ``x``.  What is ``summed`` over rows as if each had weight 1, as float16's are
    (``lifted``), may be more than float16 holds before it is scaled."""
    wide = torch.float32 if summed and x.dtype == torch.float16 else x.dtype
    return torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format)


@linear_rows.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(rest[_TENSORS - 2])


@linear_gradients.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_hidden, d_weight, d_bias = (
        _memory(x, summed=place > 0) if want and x is not None else hidden.new_empty(0)
        for place, (x, want) in enumerate(zip((hidden, *rest[:2]), rest[-1], strict=True))
    )
    return rest[_TENSORS - 2].new_empty(()), d_hidden, d_weight, d_bias


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.numbers = inputs[_TENSORS:]


def _gradient_later(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    no_derivative_twice()
    *tensors, scale = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    *numbers, masked, workspace_bytes, backend = ctx.numbers
    # Rows that nothing above asks for are masked too; to look for them is free on a CPU.
    masked = masked or scale.device.type == "cpu"
    _, *gradients = linear_gradients(
        *tensors, scale * upstream, *numbers, masked, workspace_bytes, backend, wanted
    )
    return *_only(gradients, wanted, tensors[0].dtype), *_NOTHING


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.backend, ctx.wanted = inputs
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward begins with zeros as large as these


def _gradients_made(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:  # nobody asks for them
        return None, None, None, *_NOTHING, None
    no_derivative_twice()
    return *_scaled(ctx, upstream), *_NOTHING, None


def _scaled(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    gradients = (
        times(g.view(-1, g.shape[-1]), upstream, ctx.backend).view_as(g) if want else g
        for g, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return _only(gradients, ctx.wanted, ctx.dtype)


def _only(gradients: Iterable[Tensor], wanted: list[bool], dtype: torch.dtype) -> list[Tensor | None]:
    return [g.to(dtype) if want else None for g, want in zip(gradients, wanted, strict=True)]


_NOTHING = (None,) * (_TENSORS - 3 + _NUMBERS)

linear_rows.register_autograd(_gradient_later, setup_context=_keep_inputs)
linear_gradients.register_autograd(_gradients_made, setup_context=_keep_gradients)


def each(*arguments: Any) -> Tensor:
    """``linear_rows``: its gradients are made in backward, from logits that are made again."""
    loss: Tensor = linear_rows(*arguments)
    return loss


def total(*arguments: Any) -> Tensor:
    """The sum of ``linear_rows``, with gradients made in the same pass."""
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in arguments[:3]]
    loss: Tensor = linear_gradients(*arguments, wanted)[0]
    return loss
