"""Ask a model about texts, tokens or questions: one pass, in the order asked."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feddistill.accounting import FlopMeter
from feddistill.modelio.outputs import logits_of, span_logits
from feddistill.modelio.packing import PackedTexts
from feddistill.modelio.padding import pad
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

    Memory: one batch of activations and the answer.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
    out = torch.empty(len(tokens), classes)
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad([tokens[i] for i in rows], pad_id)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
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
    """Logits ``[m, V]``, float32, of ``rows`` of blocks, which ascend, some rows at a time.

    Args:
        model: A language model with a linear head.
        states: Given token ids and mask ``[B, L]`` and places ``[n]`` in ``B * L``, what the head multiplies
            to predict what is behind them, ``[n, H]``.
        blocks: What is read.
        rows: Which of its rows are asked.
        vocab_size: ``V``.
        pad_id: What shorter blocks are filled with.
        batch_size: Blocks a forward pass.
        bf16: Whether passes run in bfloat16.
        meter: Counts the operations.
        tick: Told of every batch.

    Memory: one batch of activations, and the logits of a few rows.
    """
    device, step = next(model.parameters()).device, blocks.length - 1
    needed = np.unique(rows // step)
    model.eval()
    for first in range(0, len(needed), batch_size):
        batch = needed[first : first + batch_size]
        ids, mask = pad([blocks[b].tolist() for b in batch], pad_id, exact=True)
        here = rows[slice(*np.searchsorted(rows, [batch[0] * step, (batch[-1] + 1) * step]))]
        places = torch.from_numpy(np.searchsorted(batch, here // step) * ids.shape[1] + here % step)
        with torch.inference_mode():
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                chosen = states(ids.to(device), mask.to(device), places.to(device))
            for logits in logits_of(model, chosen, vocab_size, bf16=bf16):
                yield logits.cpu()
        meter.add(*ids.shape, training=False)
        if on_step:
            on_step(min(first + batch_size, len(needed)), len(needed))


def answer_pages(
    model: nn.Module,
    pages: Sequence[QAWindow],
    *,
    pad_id: int,
    types: bool,
    batch_size: int,
    bf16: bool,
    meter: FlopMeter,
    on_step: ProgressCallback | None = None,
) -> list[Tensor]:
    """Logits ``[2, T]``, float32, of each page: where the answer starts, and where it ends.

    Args:
        model: For question answering.
        pages: Questions and passages.
        pad_id: What shorter pages are filled with.
        types: Whether the model reads types of tokens.
        batch_size: Pages a forward pass.
        bf16: Whether passes run in bfloat16.
        meter: Counts the operations.
        tick: Told of every batch.

    Returns:
        One for each page; ``-inf`` at tokens that can be neither.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(pages)), key=lambda i: (len(pages[i]), i))
    found = [torch.empty(0)] * len(pages)
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad([pages[i].ids for i in rows], pad_id)
            kinds = pad([pages[i].types for i in rows], 0)[0].to(device) if types else None
            logits = span_logits(model, ids.to(device), mask.to(device), kinds).float().cpu()
            for row, said in zip(rows, logits, strict=True):
                chosen = torch.from_numpy(pages[row].choices)
                found[row] = said[:, : len(chosen)].masked_fill(~chosen, -torch.inf)
            meter.add(*ids.shape, training=False)
            if on_step:
                on_step(start + len(rows), len(order))
    return found
