"""The loss of a projection, a chunk of rows at a time.

A backend has one function, ``rows``: the loss of each row, with the gradients it is given memory for.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from feddistill_kernels.distillation import _reference

Rows = Callable[..., Tensor]


def chunked(
    loss_rows: Rows,
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
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    *,
    vocab: int,
    kind: str,
    beta: float,
    temperature: float,
    kd: float,
    ce: float,
    workspace_bytes: int,
) -> Tensor:
    """Return ``scale * (kd D + ce CE)`` ``[N]`` and write the gradients of its sum to ``d_*``.

    ``loss_rows`` is the ``rows`` of a backend of ``distillation``.
    """
    loss = torch.zeros_like(scale)
    for gradient in (d_hidden, d_weight, d_bias):
        if gradient is not None and (gradient is d_hidden or gradient.shape[0] > vocab):
            gradient.zero_()
    live = scale.nonzero()[:, 0]
    everything = len(live) == len(scale)
    used_weight = weight[:vocab]  # the others are padding
    used_bias = None if bias is None else bias[:vocab]
    wants_gradient = d_hidden is not None or d_weight is not None or d_bias is not None
    step = _rows_at_once(hidden, teacher if ids is None and not everything else None, teacher_hidden, vocab)
    step = max(1, min(len(live), workspace_bytes // step))
    logits = hidden.new_empty((step, vocab))
    others = None if teacher_hidden is None else teacher_hidden.new_empty((step, vocab))
    sums = _Sums(d_weight, d_bias, vocab, several=step < len(live))
    for start in range(0, len(live), step):
        part: slice | Tensor = slice(start, start + step)
        if not everything:
            part = live[part]
        h = hidden[part]
        z = _product(h, used_weight, used_bias, logits[: len(h)])
        if teacher_hidden is None:
            assert teacher is not None
            t = teacher[part]
        else:
            assert teacher_weight is not None
            assert others is not None
            t = _product(teacher_hidden[part], teacher_weight, teacher_bias, others[: len(h)])
        loss[part] = loss_rows(
            z,
            t,
            None if ids is None else ids[part],
            None if log_tail is None else log_tail[part],
            None if labels is None else labels[part],
            scale[part],
            z if wants_gradient else None,
            vocab=vocab,
            kind=kind,
            beta=beta,
            temperature=temperature,
            kd=kd,
            ce=ce,
        )
        if d_hidden is not None:
            if everything:
                torch.mm(z, used_weight, out=d_hidden[part])
            else:
                d_hidden[part] = z @ used_weight
        sums.add(z, h)
    sums.finish()
    return loss


rows = partial(chunked, _reference.rows)


def _rows_at_once(hidden: Tensor, gathered: Tensor | None, teacher_hidden: Tensor | None, vocab: int) -> int:
    """Bytes that one row takes."""
    made = (x.element_size() for x in (hidden, gathered, teacher_hidden) if x is not None)
    return max(1, vocab * sum(made))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


class _Sums:
    """Gradients of weight and bias summed over chunks, in float32 where that is more than their dtype has."""

    def __init__(self, d_weight: Tensor | None, d_bias: Tensor | None, vocab: int, several: bool) -> None:
        self.results = [None if x is None else x[:vocab] for x in (d_weight, d_bias)]
        self.wide = [
            x.new_empty(x.shape, dtype=torch.float32)
            if x is not None and several and x.element_size() < 4
            else x
            for x in self.results
        ]
        self.first = True

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        """A chunk's slopes ``[n, V]`` and hidden states."""
        weight, bias = self.wide
        if weight is not None:
            if weight.dtype != dz.dtype:
                product = dz.T @ hidden
                weight.copy_(product) if self.first else weight.add_(product)
            elif self.first:
                torch.mm(dz.T, hidden, out=weight)
            else:
                weight.addmm_(dz.T, hidden)
        if bias is not None:
            total = dz.sum(0, dtype=bias.dtype if bias.element_size() > 2 else torch.float32)
            bias.copy_(total) if self.first else bias.add_(total)
        self.first = False

    def finish(self) -> None:
        """Leave the sums where they were asked for; 0 where there was no row."""
        for result, wide in zip(self.results, self.wide, strict=True):
            if result is None or wide is None:
                continue
            if self.first:
                result.zero_()
            elif wide is not result:
                result.copy_(wide)
