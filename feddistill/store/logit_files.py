"""Memory-mapped teachers: log-probabilities on disk, dense or compressed."""

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddistill_kernels import TopK

NAME = "log_probs"
TYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type and shape of each tensor, by name."""

T = TypeVar("T", Tensor, TopK)


class _Mapped:
    """Memory-mapped tensors of a safetensors file."""

    def __init__(self, path: Path, *, write: bool):
        with path.open("r+b" if write else "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), 0, access=access)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, entry in header.items():
            shape, offset = tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
            flat = np.frombuffer(self._map, TYPES[entry["dtype"]], math.prod(shape), offset)
            self.arrays[name] = flat.reshape(shape)

    def forget(self) -> None:
        """Drop the mapped pages from memory; they are read again on access."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _create(path: Path, layout: Layout, metadata: Mapping[str, str]) -> None:
    """Write a file of zeros, byte-identical to what ``safetensors`` would write."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (kind, shape) in layout.items():
        size = math.prod(shape) * TYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header, separators=(",", ":")).encode("ascii")
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


class TensorFile:
    """Dense teacher: the tensor ``log_probs``, float32 ``[N, V]``."""

    def __init__(self, path: Path, *, write: bool = False):
        self._file = _Mapped(path, write=write)
        self._rows = self._file.arrays[NAME]

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int]) -> "TensorFile":
        """Create a file of zeros."""
        _create(path, {NAME: ("F32", shape)}, {})
        return cls(path, write=True)

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Open an existing file for reading."""
        return cls(path)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, V)``."""
        return self._rows.shape

    def put(self, start: int, rows: Tensor) -> None:
        """Write rows from ``start`` on."""
        self._rows[start : start + len(rows)] = rows.numpy()
        self._file.forget()

    def __call__(self, start: int, stop: int) -> Tensor:
        """A copy of some rows."""
        found = torch.from_numpy(self._rows[start:stop].copy())
        self._file.forget()
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """A copy of these rows, in this order."""
        found = torch.from_numpy(self._rows[rows.cpu().numpy()])
        self._file.forget()
        return found


class TopKFile:
    """Compressed teacher, ``N`` rows: ``ids``, ``log_probs``, ``log_tail``; metadata ``vocab_size``."""

    def __init__(self, path: Path, *, write: bool = False):
        self._file = _Mapped(path, write=write)
        arrays = self._file.arrays
        self._ids, self._log_probs, self._log_tail = (arrays[n] for n in ("ids", NAME, "log_tail"))
        self.vocab_size = int(self._file.metadata["vocab_size"])

    @classmethod
    def create(cls, path: Path, rows: int, kept: int, vocab_size: int) -> "TopKFile":
        """Create a file of zeros with ``kept`` entries per row."""
        wide = (rows, kept)
        layout = {"ids": ("I32", wide), NAME: ("F32", wide), "log_tail": ("F32", (rows,))}
        _create(path, layout, {"vocab_size": str(vocab_size)})
        return cls(path, write=True)

    @classmethod
    def open(cls, path: Path) -> "TopKFile":
        """Open an existing file for reading."""
        return cls(path)

    def put(self, start: int, rows: TopK) -> None:
        """Write rows from ``start`` on."""
        part = slice(start, start + len(rows))
        self._ids[part], self._log_probs[part] = rows.ids.numpy(), rows.log_probs.numpy()
        self._log_tail[part] = rows.log_tail.numpy()
        self._file.forget()

    def __call__(self, start: int, stop: int) -> TopK:
        """A copy of some rows."""
        return self._taken(slice(start, stop))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, rows: Tensor) -> TopK:
        """A copy of these rows, in this order."""
        return self._taken(rows.cpu().numpy())

    def _taken(self, rows: slice | NDArray[np.int64]) -> TopK:
        parts = (torch.from_numpy(a[rows].copy()) for a in (self._ids, self._log_probs, self._log_tail))
        ids, log_probs, log_tail = parts
        self._file.forget()
        return TopK(ids, log_probs, log_tail, self.vocab_size)


class Chained:
    """Concatenation of teachers of one kind."""

    def __init__(self, files: Sequence[TensorFile | TopKFile]):
        self._files = files
        self._ends = torch.tensor([len(file) for file in files]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: Tensor) -> Any:
        """A copy of these rows, in this order: a tensor or a ``TopK``, depending on the files."""
        rows = rows.cpu()
        which = torch.bucketize(rows, self._ends, right=True)
        parts: list[Any] = []
        for number, file in enumerate(self._files):
            here = rows[which == number]
            if len(here):
                parts.append(file[here - (self._ends[number] - len(file))])
        return concatenate(parts)[which.argsort(stable=True).argsort()] if parts else self._files[0][rows]


def concatenate(parts: list[T]) -> T:
    """Concatenate rows; a single part is not copied."""
    first = parts[0]
    if isinstance(first, TopK):
        return TopK.cat(parts)
    return first if len(parts) == 1 else torch.cat(parts)
