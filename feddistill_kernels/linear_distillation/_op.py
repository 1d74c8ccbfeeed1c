"""``feddistill::linear_distillation``: schema, shapes for the compiler, gradient.  No arithmetic here."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._backend import load, operator, schema_like
from feddistill_kernels._check import no_derivative_twice
from feddistill_kernels.distillation._op import times

_TENSORS, _NUMBERS = 11, 9  # of the arguments of ``_rows`` before ``*``


def _rows(
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
    *,
    d_hidden: Tensor | None = None,
    d_weight: Tensor | None = None,
    d_bias: Tensor | None = None,
) -> Tensor:
    """``rows`` of a backend, see ``_reference.py``; the operators below take the arguments before ``*``."""
    module = load("linear_distillation", backend, hidden, kind=kind)
    # The products are of the dtype of what they multiply, as documented, and not of autocast's.
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = module.rows(
            hidden,
            weight,
            bias,
            teacher,
            ids,
            log_tail,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            labels,
            scale,
            d_hidden,
            d_weight,
            d_bias,
            vocab=vocab,
            kind=kind,
            beta=beta,
            temperature=temperature,
            kd=kd,
            ce=ce,
            masked=masked,
            workspace_bytes=workspace_bytes,
        )
    return loss


@operator("feddistill::linear_distillation", schema_like(_rows, "Tensor"))
def linear_rows(*arguments: Any) -> Tensor:
    """The loss of each row, ``[N]``; backward makes the gradients."""
    return _rows(*arguments)


@operator(
    "feddistill::linear_distillation_gradients",
    schema_like(_rows, "(Tensor, Tensor, Tensor, Tensor)", more=", bool[] wanted"),
)
def linear_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of ``linear_rows``, and its gradients to hidden, weight and bias; empty if not wanted."""
    *arguments_of_rows, wanted = arguments
    gradients = [
        _memory(x, summed=place > 0) if want and x is not None else None
        for place, (x, want) in enumerate(zip(arguments[:3], wanted, strict=True))
    ]
    d_hidden, d_weight, d_bias = gradients
    loss = _rows(*arguments_of_rows, d_hidden=d_hidden, d_weight=d_weight, d_bias=d_bias)
    first, second, third = (arguments[0].new_empty(0) if g is None else g for g in gradients)
    return loss.sum(), first, second, third


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
    # Rows with upstream gradient 0 are masked too; on a CPU finding them is free.
    masked = masked or scale.device.type == "cpu"
    _, *gradients = linear_gradients.dispatched(
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
    if upstream is None:  # nothing above depends on the loss
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
    loss: Tensor = linear_rows.dispatched(*arguments)
    return loss


def total(*arguments: Any) -> Tensor:
    """The sum of ``linear_rows``, with gradients made in the same pass."""
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in arguments[:3]]
    loss: Tensor = linear_gradients.dispatched(*arguments, wanted)[0]
    return loss
