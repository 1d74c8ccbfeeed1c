"""One of each GPU kernel compiles and spills nothing, and the committed table is of these kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="what compiles the kernels")

ROOT = Path(__file__).parents[1]
COMMITTED = json.loads((ROOT / "bench/results/resources.json").read_text())


def compiled(folder, known):
    """Made in a process of its own, where Triton compiles: in this one it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    (folder / "known.json").write_text(json.dumps(known))
    out, check = folder / "resources.json", folder / "known.json"
    command = [sys.executable, "-m", "bench.resources", "--one-each", "--out", out, "--check", check]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return run, json.loads(out.read_text())["kernels"] if out.exists() else None


def kernel(row):
    return row["kernel"].split()[0]


def test_one_of_each_kernel_spills_nothing_and_the_committed_table_lists_all(tmp_path):
    run, found = compiled(tmp_path, COMMITTED)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    triton = [row for row in found if row["backend"] == "triton"]
    assert {row["target"] for row in triton} == {"sm_80", "sm_90", "sm_100"}
    assert {kernel(row) for row in triton} == {
        kernel(row) for row in COMMITTED["kernels"] if row["backend"] == "triton"
    }
    assert [row for row in found if row["stack_bytes"]] == []


def test_a_table_of_other_kernels_is_found_out(tmp_path):
    first, *rest = COMMITTED["kernels"]
    other = {**first, "kernel": "another"}
    run, found = compiled(tmp_path, {"kernels": [other, *rest]})
    assert run.returncode == 1
    assert found is None
    assert f"{first['kernel']}: is not listed" in run.stderr
    assert "another: is listed, but does not exist" in run.stderr


def test_the_committed_table_has_no_spill():
    assert COMMITTED["kernels"]
    assert [row for row in COMMITTED["kernels"] if row["stack_bytes"]] == []
