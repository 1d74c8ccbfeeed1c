"""Ask a model about texts: one pass, sorted by length, in the order asked."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from feddistill.accounting import FlopMeter
from feddistill.batches import pad
from feddistill.types import Tick


def answer(
    model: nn.Module,
    tokens: Sequence[Sequence[int]],
    classes: int,
    *,
    pad_id: int,
    batch_size: int,
    bf16: bool,
    meter: FlopMeter,
    tick: Tick | None = None,
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
            if tick:
                tick(start + len(rows), len(order))
    return out
