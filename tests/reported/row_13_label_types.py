"""Parquet files with labels int64 and float64, and -1: three classes became six, -1 a class."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
from pyarrow import parquet


def check(folder, **settings):
    """Check a run on the texts in ``folder``; returns the exit status and what was printed."""
    data = {
        "source": {"kind": "files", "path": f"{folder}/texts", **settings},
        "private": {"size": 40},
        "validation": {"size": 4},
        "test": {"size": 4},
        "proxy": {"source": {"kind": "files", "path": f"{folder}/public", "no_label": -1}}
        if settings
        else {"size": 4},
        "partition": {"kind": "iid", "clients": 1},
    }
    config = Path(folder, "run.yaml")
    config.write_text(json.dumps({"data": data, "baselines": []}))
    command = [sys.executable, "-m", "feddistill.cli", "config", "check", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def write(path, labels, kind):
    path.parent.mkdir(exist_ok=True)
    texts = [f"{path.stem} {row}" for row in range(len(labels))]
    parquet.write_table(pyarrow.table({"text": texts, "label": pyarrow.array(labels, kind)}), path)


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write(folder / "texts" / "a.parquet", [0, 1, 2] * 10, pyarrow.int64())
    write(folder / "texts" / "b.parquet", [0.0, 1.0, 2.0] * 10, pyarrow.float64())
    write(folder / "public" / "a.parquet", [0, 1, -1, None], pyarrow.int64())
    status, three = check(folder)
    known, public = check(folder, no_label=-1)
    write(folder / "texts" / "b.parquet", [0.0, 1.0, -1.0] * 10, pyarrow.float64())
    refused, error = check(folder)

print(three, public, error, sep="\n")
print("right: classes 0, 1 and 2; null and -1 are no label in the public texts; -1 alone names no_label")
header = next((line.split() for line in three.splitlines() if line.endswith("total")), [])
right = (
    header == ["0", "1", "2", "total"] and status == known == 0 and refused == 2 and "no_label: -1" in error
)
print("right" if right else "WRONG")
sys.exit(not right)
