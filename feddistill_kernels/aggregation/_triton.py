"""Aggregation of compressed answers in Triton: a table of log-probabilities by id, and a rule on it.

A row in which no id is left is NaN: an error message would need a host sync.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from feddistill_kernels._triton import launch, missing, power_of_two
from feddistill_kernels.aggregation import _triton_kernels as kernels
from feddistill_kernels.aggregation._reference import SMOOTHING, krum_weights, mixing_weights
from feddistill_kernels.aggregation._rules import Settings
from feddistill_kernels.topk._triton import sorting_warps

__all__ = ["aggregate", "cannot", "missing"]

MOST_CLIENTS = 64
MOST_ENTRIES = 4096
"""Most kept entries of all clients in a row: they are sorted in registers."""

CELLS = 2048
"""Columns of the table worked on at once."""
TABLE = 1 << 26
"""Bytes of the table at once, at the most."""

# The median is a trimmed mean, and Krum a mean of those that it chose.
_RULES = {"median": "trimmed_mean", "krum": "mean_logits"}


def cannot(device_type: str, clients: int, entries: int) -> str | None:
    """Why it cannot run this call; ``None`` if it can."""
    if clients > MOST_CLIENTS:
        return f"it takes at most {MOST_CLIENTS} clients, got {clients}"
    if entries > MOST_ENTRIES:
        return f"it sorts at most {MOST_ENTRIES} entries of all clients a row, got {entries}"
    return None


def aggregate(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    weights: Tensor | None,
    k: int,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and log tail mass; ``missing[c] [N]`` stands for ids not in ``ids[c]``."""
    answers = _Answers(ids, log_probs, missing, vocab)
    n, count, device = ids[0].shape[0], len(ids), ids[0].device
    mixing = None
    if settings.mix is not None:
        mixing = mixing_weights(answers.distances(None), settings.mix).float()
    if settings.rule == "krum":
        weights = krum_weights(answers.distances(mixing), settings.byzantine, settings.keep)
    if weights is None:
        weights = torch.ones(count, dtype=torch.float32, device=device)
    shares = (weights / weights.sum(0)).float()  # [C] or [C, N]
    out_ids = torch.empty((n, k), dtype=torch.int32, device=device)
    out_log_probs = torch.empty((n, k), dtype=torch.float32, device=device)
    out_log_tail = torch.empty(n, dtype=torch.float32, device=device)
    width, others = answers.width, vocab - answers.width
    for part, union, table in answers.tables(mixing):
        rows = len(table)
        here, strides = shares, (shares.stride(0), 0)
        if settings.rule == "geometric_median":
            here, strides = torch.empty((rows, count), dtype=torch.float32, device=device), (1, count)
            launch(
                kernels.weiszfeld,
                (rows,),
                *(table, here, width, others, settings.tolerance, SMOOTHING, settings.max_iterations),
                warps=4,
                **answers.pairs,
            )
        elif shares.dim() == 2:
            here, strides = shares[:, part], (shares.stride(0), shares.stride(1))
        y = torch.empty((rows, width + 1), dtype=torch.float32, device=device)
        clients = answers.pairs["CP"]
        block = min(CELLS // clients, power_of_two(width + 1))
        launch(
            kernels.combine,
            (rows, -(-(width + 1) // block)),
            *(table, here, y, width, *strides, settings.trim, settings.keep),
            warps=4,
            RULE=_RULES.get(settings.rule, settings.rule),
            C=count,
            CP=clients,
            B=block,
        )
        lanes = max(2, power_of_two(width))
        launch(
            kernels.finish,
            (rows,),
            *(union, y, out_ids[part], out_log_probs[part], out_log_tail[part], width, others, k),
            warps=sorting_warps(lanes, power_of_two(k) if k < width else 0),
            CUT=k < width,
            K=max(2, power_of_two(k)),
            P=lanes,
        )
    return out_ids, out_log_probs, out_log_tail


class _Answers:
    """The clients' answers, as tables of some rows at a time."""

    def __init__(
        self, ids: Sequence[Tensor], log_probs: Sequence[Tensor], missing: Sequence[Tensor], vocab: int
    ) -> None:
        self.ids, self.log_probs, self.missing = ids, log_probs, missing
        self.entries = sum(i.shape[1] for i in ids)
        self.width = min(self.entries, vocab)
        self.others = vocab - self.width
        clients = max(2, power_of_two(len(ids)))
        self.pairs = {"C": len(ids), "CP": clients, "B": max(1, CELLS // clients**2)}
        """Constants of kernels that look at all pairs of clients."""

    def tables(self, mixing: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their ids ``[n, W]`` and the table ``[n, W + 1, C]``, of mixed clients if they are."""
        count, device = len(self.ids), self.ids[0].device
        client_of = torch.cat(
            [torch.full((i.shape[1],), c, dtype=torch.int32, device=device) for c, i in enumerate(self.ids)]
        )
        step = max(1, TABLE // ((self.width + 1) * count * 4))
        for start in range(0, self.ids[0].shape[0], step):
            part = slice(start, start + step)
            ids = torch.cat([i[part] for i in self.ids], dim=-1)
            log_probs = torch.cat([x[part].float() for x in self.log_probs], dim=-1)
            missing = torch.stack([m[part].float() for m in self.missing], dim=-1)
            rows = len(ids)
            union = torch.empty((rows, self.width), dtype=torch.int32, device=device)
            table = torch.empty((rows, self.width + 1, count), dtype=torch.float32, device=device)
            lanes = max(2, power_of_two(self.entries))
            launch(
                kernels.spread,
                (rows,),
                *(ids, log_probs, missing, client_of, union, table, self.entries, self.width),
                warps=sorting_warps(lanes, 0),
                C=count,
                P=lanes,
                B=1024,
            )
            if mixing is not None:
                launch(
                    kernels.mix,
                    (rows,),
                    *(table, mixing, self.width, self.others),
                    warps=4,
                    **self.pairs,
                )
            yield part, union, table

    def distances(self, mixing: Tensor | None) -> Tensor:
        """Squared distances ``[C, C]``, float64, between centred answers, over all rows."""
        count, device = len(self.ids), self.ids[0].device
        total = torch.zeros((count, count), dtype=torch.float64, device=device)
        for _, _, table in self.tables(mixing):
            each = torch.empty((len(table), count, count), dtype=torch.float32, device=device)
            launch(
                kernels.distances,
                (len(table),),
                *(table, each, self.width, self.others),
                warps=4,
                **self.pairs,
            )
            total += each.sum(0, dtype=torch.float64)
        return total.fill_diagonal_(0.0)
