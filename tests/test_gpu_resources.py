"""Every GPU kernel compiles for every target and spills nothing; the committed table is of these kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "bench/results/resources.json"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Made in a process of its own, where Triton compiles: in this one it interprets."""
    folder = tmp_path_factory.mktemp("resources")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    out = folder / "resources.json"
    command = [sys.executable, "-m", "bench.resources", "--out", out]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text())["kernels"]


def names(kernels, backend):
    return {(row["operator"], row["kernel"], row["target"]) for row in kernels if row["backend"] == backend}


def test_nothing_spills(report):
    assert report
    assert [row for row in report if row["stack_bytes"]] == []


def test_every_kernel_is_compiled_for_every_target(report):
    for backend in ("triton", "cuda"):
        kernels = {(operator, kernel) for operator, kernel, _ in names(report, backend)}
        for target in ("sm_80", "sm_90", "sm_100"):
            assert {(o, k) for o, k, t in names(report, backend) if t == target} == kernels, (backend, target)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_committed_table_is_of_these_kernels(report, backend):
    made = names(report, backend)
    if not made:
        pytest.skip("the extension was built without CUDA")
    assert made == names(json.loads(COMMITTED.read_text())["kernels"], backend)
