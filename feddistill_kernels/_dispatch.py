"""Which backend runs a call that several can run: a table whose first matching entry decides.

Fastest first, where it was measured (``bench/results/``).  No GPU has measured the kernels for one yet: there
Triton's go first, which are the same on every machine, and CUDA C++ runs if it is named.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

ANY_NUMBER = (0, float("inf"))


@dataclass(frozen=True)
class Entry:
    """Backends for a set of calls, best first; a field that is left out matches every call."""

    device: str
    backends: tuple[str, ...]
    operators: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    least_capability: tuple[int, int] = (0, 0)
    """Compute capability of a GPU."""
    rows: tuple[int, float] = ANY_NUMBER
    """``N``, from and up to."""
    columns: tuple[int, float] = ANY_NUMBER
    """``V``, from and up to."""

    @cached_property
    def any_shape(self) -> bool:
        """Whether it matches every shape."""
        return self.rows == self.columns == ANY_NUMBER

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it matches calls on tensors of this shape, ``[..., V]``."""
        columns = shape[-1] if shape else 1
        rows = 1
        for size in shape[:-1]:
            rows *= size
        return self.rows[0] <= rows <= self.rows[1] and self.columns[0] <= columns <= self.columns[1]


TABLE: tuple[Entry, ...] = (
    # On a CPU Triton only runs interpreted, in tests.
    Entry("cpu", ("native", "reference", "triton")),
    Entry("cuda", ("triton", "reference", "native")),
)


def entries(op: str, device: torch.device, dtype: torch.dtype | None) -> tuple[Entry, ...]:
    """The entries that calls of ``op`` on tensors of this device and dtype may match, in order."""
    capability = (0, 0)
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
    found = tuple(
        entry
        for entry in TABLE
        if entry.device == device.type
        and (not entry.operators or op in entry.operators)
        and (not entry.dtypes or dtype in entry.dtypes)
        and entry.least_capability <= capability
    )
    return found or (Entry(device.type, ("reference",)),)
