"""Every GPU kernel compiles and spills nothing, and the committed table is of these kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="what compiles the kernels")

ROOT = Path(__file__).parents[1]
COMMITTED = json.loads((ROOT / "bench/results/resources.json").read_text())["kernels"]


def compiled(folder, *arguments):
    """Made in a process of its own, where Triton compiles: in this one it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    out = folder / "resources.json"
    command = [sys.executable, "-m", "bench.resources", "--out", out, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text())["kernels"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("resources"), "--target", "90")


def names(kernels, backend, target=None):
    return {
        (row["operator"], row["kernel"])
        for row in kernels
        if row["backend"] == backend and row["target"] == (target or row["target"])
    }


def test_nothing_spills(report):
    assert report
    assert [row for row in report if row["stack_bytes"]] == []


def test_one_of_each_kernel_spills_nothing_on_the_other_targets(tmp_path):
    found = compiled(tmp_path, "--target", "80", "--target", "100", "--one-each")
    assert {row["target"] for row in found if row["backend"] == "triton"} == {"sm_80", "sm_100"}
    assert names(found, "triton", "sm_80") == names(found, "triton", "sm_100")
    assert [row for row in found if row["stack_bytes"]] == []


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_committed_table_lists_every_kernel_for_every_target(report, backend, target):
    made = names(report, backend, "sm_90")
    if not made:
        pytest.skip("the extension was built without CUDA")
    assert made == names(COMMITTED, backend, target)


def test_the_committed_table_has_no_spill():
    assert COMMITTED
    assert [row for row in COMMITTED if row["stack_bytes"]] == []
