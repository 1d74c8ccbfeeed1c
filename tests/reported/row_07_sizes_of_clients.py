"""77 classes of 5 texts, 4 clients, Dirichlet 0.3: the mean size of each client over ten seeds."""

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np

from feddistill.config import parse
from feddistill.data import load


def sizes(path: Path, seed: int, alpha: float) -> list[int]:
    """The number of private texts of each client."""
    other = {"source": {"kind": "files", "path": str(path)}, "size": 4}
    partition = {"kind": "dirichlet", "clients": 4, "alpha": alpha, "min_examples": 10}
    parts = {"private": {"size": None}, "proxy": other, "validation": other, "test": other}
    config = parse({"data": {"source": other["source"], "partition": partition, **parts}})
    return [len(client) for client in load(config.data, seed).private]


def table(folder: Path, classes: int, size: int) -> Path:
    """A file of ``classes * size`` texts."""
    path = folder / f"{classes}.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([f"text {i} of {c}", f"c{c}"] for c in range(classes) for i in range(size))
    return path


with tempfile.TemporaryDirectory() as scratch:
    mean = np.mean([sizes(table(Path(scratch), 77, 5), seed, 0.3) for seed in range(10)], axis=0)
    print(f"mean sizes {mean.round().astype(int).tolist()}; right: 96 each, give or take 14")
    even = sizes(table(Path(scratch), 50, 3), 0, 1000.0)
print(f"50 classes of 3, alpha 1000: {even}; right: about 38 each")
sys.exit(int(np.abs(mean - 96.25).max() > 14 or min(even) < 20))
