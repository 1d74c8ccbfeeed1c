"""A teacher on disk: a float32 tensor in a safetensors file, in memory only where it is worked on."""

import json
import math
import mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAME = "log_probs"
F32 = np.dtype("<f4")


class TensorFile:
    """``[N, V]`` under the name ``log_probs``; what ``safetensors`` itself would write, to the byte."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int], head: int, *, write: bool):
        self.shape = shape
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
        self._map = mmap.mmap(file.fileno(), head + math.prod(shape) * F32.itemsize, access=access)
        self._rows: NDArray[np.float32] = np.frombuffer(self._map, F32, offset=head).reshape(shape)

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int]) -> "TensorFile":
        """A new file, full of zeros."""
        size = math.prod(shape) * F32.itemsize
        entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
        raw = json.dumps({NAME: entry}, separators=(",", ":")).encode("ascii")
        raw += b" " * (-len(raw) % 8)
        with path.open("w+b") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + size)
            file.flush()
            return cls(file, shape, 8 + len(raw), write=True)

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """What ``create`` made."""
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            first, second = json.loads(file.read(size))[NAME]["shape"]
            return cls(file, (int(first), int(second)), 8 + size, write=False)

    def put(self, start: int, rows: Tensor) -> None:
        """Write rows from ``start`` on."""
        self._rows[start : start + len(rows)] = rows.numpy()
        self._forget()

    def __call__(self, start: int, stop: int) -> Tensor:
        """A copy of some rows."""
        found = torch.from_numpy(self._rows[start:stop].copy())
        self._forget()
        return found

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """A copy of these rows, in this order."""
        found = torch.from_numpy(self._rows[rows.cpu().numpy()])
        self._forget()
        return found

    def _forget(self) -> None:
        """Pages are the file's: they come back when they are asked for."""
        self._map.madvise(mmap.MADV_DONTNEED)
