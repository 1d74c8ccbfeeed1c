"""Forward passes over texts, packed texts and question windows; results come in the order of the input."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feddistill.accounting import FlopMeter
from feddistill.modelio.outputs import logits_of, span_logits
from feddistill.modelio.packing import PackedTexts
from feddistill.modelio.padding import inputs, pad
from feddistill.modelio.passages import QAWindow
from feddistill.types import ProgressCallback


def answer(
    model: nn.Module,
    tokens: Sequence[Sequence[int]],
    classes: int,
    *,
    pad_id: int,
    batch_size: int,
    bf16: bool,
    meter: FlopMeter,
    on_step: ProgressCallback | None = None,
) -> Tensor:
    """Log-probabilities ``[N, V]``, float32, of each text in ``tokens``.

    Memory: one batch of activations and the result.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
    out = torch.empty(len(tokens), classes)
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad([tokens[i] for i in rows], pad_id)
            given = {name: value.to(device) for name, value in inputs(ids).items()}
            logits = model(**given, attention_mask=mask.to(device)).logits
            out[rows] = logits.float().log_softmax(-1).cpu()
            meter.add(*ids.shape, training=False)
            if on_step:
                on_step(start + len(rows), len(order))
    return out


def answer_rows(
    model: nn.Module,
    states: Callable[[Tensor, Tensor, Tensor], Tensor],
    blocks: PackedTexts,
    rows: NDArray[np.int64],
    vocab_size: int,
    *,
    pad_id: int,
    batch_size: int,
    bf16: bool,
    meter: FlopMeter,
    on_step: ProgressCallback | None = None,
) -> Iterator[Tensor]:
    """Logits ``[m, V]``, float32, of some rows of packed texts, a few rows at a time.

    Args:
        model: A language model with a linear head.
        states: Maps token ids and mask ``[B, L]`` and positions ``[n]`` in ``B * L`` to the input of the
            head, ``[n, H]``, from which the token after each position is predicted.
        blocks: The packed texts.
        rows: The rows to predict, ascending.
        vocab_size: ``V``.
        pad_id: Fills blocks that are shorter than others in the batch.
        batch_size: Blocks per forward pass.
        bf16: True to run passes in bfloat16.
        meter: Counts the operations.
        on_step: Called after every batch.

    Memory: one batch of activations, and the logits of a few rows.
    """
    device, step = next(model.parameters()).device, blocks.length - 1
    needed = np.unique(rows // step)
    model.eval()
    for first in range(0, len(needed), batch_size):
        batch = needed[first : first + batch_size]
        ids, mask = pad([blocks[b].tolist() for b in batch], pad_id, exact=True)
        in_batch = rows[slice(*np.searchsorted(rows, [batch[0] * step, (batch[-1] + 1) * step]))]
        positions = np.searchsorted(batch, in_batch // step) * ids.shape[1] + in_batch % step
        with torch.inference_mode():
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden = states(ids.to(device), mask.to(device), torch.from_numpy(positions).to(device))
            for logits in logits_of(model, hidden, vocab_size, bf16=bf16):
                yield logits.cpu()
        meter.add(*ids.shape, training=False)
        if on_step:
            on_step(min(first + batch_size, len(needed)), len(needed))


def answer_windows(
    model: nn.Module,
    windows: Sequence[QAWindow],
    *,
    pad_id: int,
    types: bool,
    batch_size: int,
    bf16: bool,
    meter: FlopMeter,
    on_step: ProgressCallback | None = None,
) -> list[Tensor]:
    """Logits ``[2, T]``, float32, of each window: of the answer's start, and of its end.

    Args:
        model: For question answering.
        windows: Questions and passages.
        pad_id: Fills windows that are shorter than others in the batch.
        types: True if the model reads token types.
        batch_size: Windows per forward pass.
        bf16: True to run passes in bfloat16.
        meter: Counts the operations.
        on_step: Called after every batch.

    Returns:
        One tensor for each window; ``-inf`` at tokens that an answer cannot begin or end with.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(windows)), key=lambda i: (len(windows[i]), i))
    out = [torch.empty(0)] * len(windows)
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad([windows[i].ids for i in rows], pad_id)
            kinds = pad([windows[i].types for i in rows], 0)[0].to(device) if types else None
            batch = span_logits(model, ids.to(device), mask.to(device), kinds).float().cpu()
            for row, logits in zip(rows, batch, strict=True):
                choices = torch.from_numpy(windows[row].choices)
                out[row] = logits[:, : len(choices)].masked_fill(~choices, -torch.inf)
            meter.add(*ids.shape, training=False)
            if on_step:
                on_step(start + len(rows), len(order))
    return out
