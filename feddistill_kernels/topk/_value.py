"""The value ``TopK``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feddistill_kernels._check import NO_ID, bind, distinct_ids, floating, one_of, same_device


@dataclass(frozen=True)
class TopK:
    """``N`` distributions over ``V`` entries, each by ``K`` of them and the mass of the others.

    Args:
        ids: int32 ``[N, K]``, the kept entries, distinct within a row, in any order.  -1 stands for no entry,
            in rows that keep fewer than ``K``.
        log_probs: Floating ``[N, K]``, their log-probabilities; what is beside an id of -1 is not looked at.
        log_tail: Floating ``[N]``, log of the mass of all others; ``-inf`` where it is 0.
        vocab_size: ``V``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.  Values are not looked at: that would be a pass
            over the data and, on a GPU, a stall.  Operators on the CPU raise it for a row that has an id
            twice or one outside ``[-1, V)``; on a GPU the result of a row with an id twice is undefined.

    Example:
        >>> import torch
        >>> kept = TopK(torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([[0.6, 0.2]]).log(),
        ...             torch.tensor([0.2]).log(), vocab_size=4)
        >>> kept.expand().exp()
        tensor([[0.6000, 0.1000, 0.2000, 0.1000]])
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocab_size: int

    def __post_init__(self) -> None:
        rows, kept = bind("N K", ids=self.ids, log_probs=self.log_probs)
        (tails,) = bind("N", log_tail=self.log_tail)
        if tails != rows:
            raise ValueError(f"log_tail has {tails} rows, ids has {rows}")
        if self.ids.dtype != torch.int32:
            raise ValueError(f"ids must be int32, got {self.ids.dtype}")
        floating(log_probs=self.log_probs, log_tail=self.log_tail)
        same_device(self.ids, log_probs=self.log_probs, log_tail=self.log_tail)
        if not 1 <= kept <= self.vocab_size:
            raise ValueError(
                f"ids keeps {kept} entries a row; it must be in [1, {self.vocab_size}], vocab_size"
            )

    @staticmethod
    def from_log_probs(ids: Tensor, log_probs: Tensor, vocab_size: int) -> "TopK":
        """Stored log-probabilities with the mass that is missing as tail.

        Rounded ones may add up to more than one: then, and where next to nothing is missing, the tail is what
        their dtype cannot tell from nothing, and the row is scaled so that it adds up to one.

        Args:
            ids: Integers ``[N, K]``, as in ``TopK``; -1 for no entry.
            log_probs: Floating ``[N, K]``, at temperature 1 or at that of the loss.
            vocab_size: ``V``.

        Returns:
            float32 log-probabilities and tails; without a tail where all ``V`` are kept, and ``-inf`` beside
            an id of -1.

        >>> stored = torch.tensor([[0.5, 0.25], [0.75, 0.26]]).log().half()
        >>> kept = TopK.from_log_probs(torch.tensor([[3, 1], [0, 2]]), stored, vocab_size=5)
        >>> kept.log_tail.exp()
        tensor([0.2502, 0.0010])
        """
        real = ids != NO_ID
        kept = torch.where(real, log_probs.double(), -math.inf)
        total = kept.logsumexp(-1)
        least = float(torch.finfo(log_probs.dtype).eps)
        tail = (-torch.expm1(total)).clamp(min=least)
        tail = torch.where(real.sum(-1) == vocab_size, 0.0, tail)
        # Rows of which enough is missing stay as they are, to the bit.
        scaled = kept + (torch.log1p(-tail) - total)[:, None]
        full = (tail <= least)[:, None]
        return TopK(
            ids.to(torch.int32), torch.where(full, scaled, kept).float(), tail.log().float(), vocab_size
        )

    @staticmethod
    def cat(parts: "Sequence[TopK]") -> "TopK":
        """Concatenate the rows of ``parts``, which have one ``K`` and one ``V``; a single part is not copied.

        Raises:
            ValueError: ``parts`` is empty, or K or V differ.

        >>> row = TopK.from_log_probs(torch.tensor([[1]]), torch.zeros(1, 1), vocab_size=2)
        >>> len(TopK.cat([row, row]))
        2
        """
        if not parts:
            raise ValueError("TopK.cat needs at least one part, got an empty list")
        if len(parts) == 1:
            return parts[0]
        sizes = {(part.ids.shape[1], part.vocab_size) for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"TopK.cat needs parts of one K and one V, got {sorted(sizes)}")
        return TopK(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.log_tail for part in parts]),
            parts[0].vocab_size,
        )

    @staticmethod
    def of_operator(ids: Tensor, log_probs: Tensor, log_tail: Tensor, vocab_size: int) -> "TopK":
        """An operator's result, unchecked: checks take longer than the top-k of a short row."""
        if torch.compiler.is_compiling():
            return TopK(ids, log_probs, log_tail, vocab_size)
        made = object.__new__(TopK)
        made.__dict__.update(ids=ids, log_probs=log_probs, log_tail=log_tail, vocab_size=vocab_size)
        return made

    def __len__(self) -> int:
        """``N``."""
        return self.ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "TopK":
        """The rows of a slice, an index tensor or a mask."""
        if not isinstance(rows, slice | Tensor):
            raise TypeError(f"TopK takes a slice or a tensor of rows, got {type(rows).__name__}")
        return TopK(self.ids[rows], self.log_probs[rows], self.log_tail[rows], self.vocab_size)

    def to(self, device: str | torch.device | None = None, *, dtype: torch.dtype | None = None) -> "TopK":
        """The same on ``device``, with probabilities of ``dtype``; ids stay int32."""
        return TopK(
            self.ids.to(device=device),
            self.log_probs.to(device=device, dtype=dtype),
            self.log_tail.to(device=device, dtype=dtype),
            self.vocab_size,
        )

    def pin_memory(self) -> "TopK":
        """The same in pinned memory: what a ``DataLoader`` calls."""
        return TopK(
            self.ids.pin_memory(), self.log_probs.pin_memory(), self.log_tail.pin_memory(), self.vocab_size
        )

    def expand(self, tail: str = "uniform") -> Tensor:
        """Log-probabilities ``[N, V]``.

        Args:
            tail: ``"uniform"`` shares the tail's mass among the ids that were not kept, so that a row sums to
                1; ``"none"`` rules them out (``-inf``), and a row sums to what was kept.

        Raises:
            ValueError: On the CPU, for a row that has an id twice or one outside ``[-1, V)``.

        >>> ids = torch.tensor([[1]], dtype=torch.int32)
        >>> TopK(ids, torch.zeros(1, 1), torch.tensor([-math.inf]), vocab_size=2).expand()
        tensor([[-inf, 0.]])
        """
        one_of("tail", tail, ("uniform", "none"))
        if tail == "uniform":
            missing = self.missing_log_prob().to(self.log_probs.dtype)
        else:
            missing = torch.full_like(self.log_probs[:, 0], -math.inf)
        distinct_ids("TopK", self.ids, self.vocab_size)
        dense = missing[:, None].repeat(1, self.vocab_size)
        ids = self.ids.long()
        log_probs = torch.where(ids == NO_ID, missing[:, None], self.log_probs)
        # scatter writes somewhere even for no entry: there, what another entry of the row writes as well.
        some = ids.argmax(-1, keepdim=True)
        ids, log_probs = (torch.where(ids == NO_ID, x.gather(-1, some), x) for x in (ids, log_probs))
        return dense.scatter_(-1, ids.clamp_min(0), log_probs)

    def others(self) -> Tensor:
        """How many ids each row did not keep, int64 ``[N]``."""
        return self.vocab_size - (self.ids != NO_ID).sum(-1)

    def missing_log_prob(self) -> Tensor:
        """Log-probability ``[N]`` of each id that was not kept, were the tail uniform; ``-inf`` if there is
        none."""
        others = self.others()
        share = self.log_tail - others.double().log().to(self.log_tail.dtype)
        return torch.where(others > 0, share, -math.inf)
