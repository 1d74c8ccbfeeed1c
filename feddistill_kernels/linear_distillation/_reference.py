"""The loss of a projection, a chunk of rows at a time.

A backend has one function, ``rows``: the loss of each row, with the gradients it is given memory for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from feddistill_kernels.distillation import _reference

Rows = Callable[..., Tensor]

TILE = 128
"""Rows of a chunk are a multiple of this if possible: a product's tile on tensor cores."""

PRODUCT = 1 << 22
"""Entries of a product that is added to a wider sum: as many as are still in cache when they are."""

ALIGNMENT = {"cuda": 64}
"""Entries that a row of logits is a multiple of, so that each begins where tensor cores load from."""


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
    masked: bool,
    workspace_bytes: int,
) -> Tensor:
    """Return ``scale * (kd D + ce CE)`` ``[N]`` and write the gradients of its sum to ``d_*``.

    ``loss_rows`` is the ``rows`` of a backend of ``distillation``.  If rows may be ``masked``, those of
    ``scale`` 0 are dropped; to find them waits for a GPU.
    """
    loss = torch.zeros_like(scale)
    live = scale.nonzero()[:, 0] if masked else None
    count = len(scale) if live is None else len(live)
    if count == len(scale):
        live = None
    elif d_hidden is not None:
        d_hidden.zero_()
    used_weight = weight[:vocab]  # the others are padding
    used_bias = None if bias is None else bias[:vocab]
    wants_gradient = d_hidden is not None or d_weight is not None or d_bias is not None
    gathered = teacher if ids is None and live is not None else None
    step = _rows_at_once(count, workspace_bytes // _bytes_a_row(hidden, gathered, teacher_hidden, vocab))
    logits = _logits(hidden, step, vocab)
    others = None if teacher_hidden is None else _logits(teacher_hidden, step, vocab)
    sums = _Sums(d_weight, d_bias, vocab, several=step < count)
    side = _Side(teacher_hidden)
    try:
        for start in range(0, count, step):
            part: slice | Tensor = slice(start, start + step)
            if live is not None:
                part = live[part]
            if teacher_hidden is None:
                assert teacher is not None
                t = teacher[part]
            else:
                assert teacher_weight is not None
                assert others is not None
                with side.ahead():
                    h = teacher_hidden[part]
                    t = _product(h, teacher_weight, teacher_bias, others[: len(h)])
            h = hidden[part]
            z = _product(h, used_weight, used_bias, logits[: len(h)])
            side.join()
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
            side.allow()
            if d_hidden is not None:
                if live is None:
                    torch.mm(z, used_weight, out=d_hidden[part])
                else:
                    d_hidden[part] = z @ used_weight
            sums.add(z, h)
    finally:
        side.join()
    logits.untyped_storage().resize_(0)  # given back before the sums take more
    sums.finish()
    return loss


rows = partial(chunked, _reference.rows)


def _bytes_a_row(hidden: Tensor, gathered: Tensor | None, teacher_hidden: Tensor | None, vocab: int) -> int:
    made = (x.element_size() for x in (hidden, gathered, teacher_hidden) if x is not None)
    return max(1, vocab * sum(made))


def _rows_at_once(count: int, most: int) -> int:
    """Rows of a chunk: as few chunks as there can be, of about one size."""
    tile = TILE if most >= TILE else 1
    most = max(1, most - most % tile)
    chunks = max(1, -(-count // most))
    return max(1, min(count, -(-count // (chunks * tile)) * tile))


def _logits(like: Tensor, rows: int, vocab: int) -> Tensor:
    """Memory for ``[rows, vocab]``."""
    alignment = ALIGNMENT.get(like.device.type, 1)
    return like.new_empty((rows, -(-vocab // alignment) * alignment))[:, :vocab]


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


class _Side:
    """A second stream of the GPU for the teacher's logits; on other devices it does nothing.

    It works in memory of the current stream, which is free again only after both: hence the last ``join``.
    """

    def __init__(self, teacher_hidden: Tensor | None) -> None:
        self.stream = None if teacher_hidden is None else _side_stream(teacher_hidden.device)
        self.allow()

    def allow(self) -> None:
        """Let the next ``ahead`` begin once the current stream has come to this point."""
        if self.stream is not None:
            self.start = torch.cuda.current_stream(self.stream.device).record_event()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Run the block on the second stream."""
        if self.stream is None:
            yield
            return
        self.stream.wait_event(self.start)
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for the second one."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One stream a device, kept: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class _Sums:
    """Gradients of weight and bias summed over chunks, in float32 where that is more than their dtype has."""

    def __init__(self, d_weight: Tensor | None, d_bias: Tensor | None, vocab: int, several: bool) -> None:
        for x in (d_weight, d_bias):
            if x is not None:
                x[vocab:] = 0
        self.results = [None if x is None else x[:vocab] for x in (d_weight, d_bias)]
        self.wide = [
            x.new_empty(x.shape, dtype=torch.float32)
            if x is not None and several and x.element_size() < 4
            else x
            for x in self.results
        ]
        self.first = True

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        """Add a chunk, given the gradients of its logits ``[n, V]`` and its hidden states."""
        weight, bias = self.wide
        if weight is not None:
            if weight.dtype != dz.dtype:
                self._add_wide(weight, dz.T, hidden)
            elif self.first:
                torch.mm(dz.T, hidden, out=weight)
            else:
                weight.addmm_(dz.T, hidden)
        if bias is not None:
            total = dz.sum(0, dtype=bias.dtype if bias.element_size() > 2 else torch.float32)
            bias.copy_(total) if self.first else bias.add_(total)
        self.first = False

    def _add_wide(self, weight: Tensor, dz: Tensor, hidden: Tensor) -> None:
        if _adds_wide(weight.device):
            if self.first:
                torch.mm(dz, hidden, out_dtype=weight.dtype, out=weight)
            else:
                torch.addmm(weight, dz, hidden, out_dtype=weight.dtype, out=weight)
            return
        for start in range(0, len(weight), step := max(1, PRODUCT // weight.shape[1])):
            part, slopes = weight[start : start + step], dz[start : start + step]
            # Of float16 a product may be too large before it is scaled: see _op.py.
            product = slopes.float() @ hidden.float() if dz.dtype == torch.float16 else slopes @ hidden
            part.copy_(product) if self.first else part.add_(product)

    def finish(self) -> None:
        """Write the sums to the gradients; 0 if there was no row."""
        for result, wide in zip(self.results, self.wide, strict=True):
            if result is None or wide is None:
                continue
            if self.first:
                result.zero_()
            elif wide is not result:
                result.copy_(wide)


def _adds_wide(device: torch.device) -> bool:
    """Whether a product of halves can be added to a float32 matrix before it is rounded to a half."""
    return device.type == "cuda" and torch.version.hip is None and torch.__version__ >= "2.11"
