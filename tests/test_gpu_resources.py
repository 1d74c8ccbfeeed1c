"""Every GPU kernel compiles and spills nothing; ``python -m bench.resources`` does it for all targets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Made in a process of its own, where Triton compiles: in this one it interprets."""
    folder = tmp_path_factory.mktemp("resources")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    out = folder / "resources.json"
    command = [sys.executable, "-m", "bench.resources", "--target", "90", "--out", out]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text())["kernels"]


def test_nothing_spills(report):
    assert report
    assert [row for row in report if row["stack_bytes"]] == []
