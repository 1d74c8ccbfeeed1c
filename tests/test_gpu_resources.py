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


SPILLED = 100
"""The target for which a kernel was seen to spill; the others take twice as long again."""

CALLS = """
import json
import sys
from click.testing import CliRunner
from bench.resources import main

for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, arguments)
    print(json.dumps([done.exit_code, done.output]))
"""


def compiled(folder, targets, checked):
    """Exit status, output and kernels for each table of known ones in ``checked``.

    Made in a process of its own, where Triton compiles: in this one it interprets.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    calls, outs = [], []
    for index, kernels in enumerate(checked):
        known, out = folder / f"{index}-known.json", folder / f"{index}.json"
        known.write_text(json.dumps({"kernels": kernels}))
        calls.append(["--one-each", "--out", str(out), "--check", str(known)])
        calls[-1] += [word for target in targets for word in ("--target", str(target))]
        outs.append(out)
    command = [sys.executable, "-c", CALLS, json.dumps(calls)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [
        (*json.loads(line), json.loads(out.read_text())["kernels"] if out.exists() else None)
        for line, out in zip(run.stdout.splitlines(), outs, strict=True)
    ]


@pytest.fixture(scope="module")
def right_and_wrong(tmp_path_factory):
    first, *rest = COMMITTED["kernels"]
    tables = [first, *rest], [{**first, "kernel": "another"}, *rest]
    return compiled(tmp_path_factory.mktemp("resources"), [SPILLED], tables)


def kernel(row):
    return row["kernel"].split()[0]


def assert_compiled(status, output, found, targets):
    assert status == 0, output
    triton = [row for row in found if row["backend"] == "triton"]
    assert {row["target"] for row in triton} == {f"sm_{target}" for target in targets}
    listed = [row for row in COMMITTED["kernels"] if row["backend"] == "triton"]
    assert {kernel(row) for row in triton} == {kernel(row) for row in listed}
    assert [row for row in found if row["stack_bytes"]] == []


def test_one_of_each_kernel_spills_nothing_and_the_committed_table_lists_all(right_and_wrong):
    assert_compiled(*right_and_wrong[0], [SPILLED])


@pytest.mark.release
def test_nor_does_it_for_the_other_targets(tmp_path):
    (found,) = compiled(tmp_path, [80, 90], [COMMITTED["kernels"]])
    assert_compiled(*found, [80, 90])


def test_a_table_of_other_kernels_is_found_out(right_and_wrong):
    status, output, found = right_and_wrong[1]
    assert status == 1
    assert found is None
    assert f"{COMMITTED['kernels'][0]['kernel']}: is not listed" in output
    assert "another: is listed, but does not exist" in output


def test_the_committed_table_has_no_spill():
    targets = {row["target"] for row in COMMITTED["kernels"] if row["backend"] == "triton"}
    assert targets == {"sm_80", "sm_90", "sm_100"}
    assert [row for row in COMMITTED["kernels"] if row["stack_bytes"]] == []
