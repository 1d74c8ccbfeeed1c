"""``bench/gpu.sh`` without a GPU: what it would do, and that it goes on, notes and ends as it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import record
from bench.bars import GPU, bars
from bench.cases import FAMILY, OPERATORS, Setup, aggregation, chosen, linear
from bench.gpu import STEPS, main
from bench.measure import by_backend, check, measure
from bench.run import SCHEMA
from bench.tables import of_gpu
from bench.timing import Contender, CpuClock, copying
from feddistill_kernels import operators
from feddistill_kernels._backend import named

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"


def script(*arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def test_its_syntax_is_right():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_the_plan_lists_every_step_and_every_case_and_does_nothing(tmp_path):
    done = script("--plan", "--out", tmp_path / "gpu.json", "--keep", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    for step in ("machine", "build", "tests", "memcheck", "racecheck", *STEPS):
        assert f"=== {step}: " in done.stdout
    lines = {line.strip() for line in done.stdout.splitlines()}
    assert {case.name for case in chosen(tuple(OPERATORS), "cuda")} <= lines
    assert "-DCMAKE_CUDA_ARCHITECTURES=<capability of the GPU>" in done.stdout
    assert "--device cuda" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def without_a_gpu(tmp_path):
    """No tool works, and of Python only what needs no GPU."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "nvcc", "nvidia-smi", "compute-sanitizer"):
        (tools / name).write_text("#!/bin/sh\nexit 7\n")
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$3" in note | bars) exec "{sys.executable}" "$@" ;; esac\nexit 3\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}


def test_what_fails_is_noted_and_the_others_go_on(tmp_path, without_a_gpu):
    out = tmp_path / "kept" / "gpu.json"
    done = script("--out", out, "--keep", tmp_path / "work", **without_a_gpu)
    assert done.returncode == 1
    found = json.loads(out.read_text())
    ended = {step["step"]: step["status"] for step in found["steps"]}
    assert list(ended) == ["machine", "build", "tests", "memcheck", *STEPS, "racecheck"]
    assert ended["machine"] == 3
    assert ended["build"] == 7
    assert all(ended[step] == 3 for step in STEPS)
    assert "not measured" in done.stdout
    assert "step loss: FAILED" in done.stdout
    assert (tmp_path / "work" / "site" / "feddistill_kernels" / "__init__.py").exists(), (
        "Triton needs no build"
    )


def test_a_step_that_takes_too_long_is_ended_whole(tmp_path):
    function = SCRIPT.read_text().split("\nwithin() {")[1].split("\n}\n")[0]
    slow = f"within() {{{function}\n}}\nnap() {{ sleep 60 & sleep 60; }}\nwithin 1 nap; echo ended $?\n"
    slow += "within 5 true; echo ended $?\nwithin 5 false; echo ended $?\n"
    done = subprocess.run(["bash", "-uc", slow], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.splitlines() == ["ended 124", "ended 0", "ended 1"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--fast"], "gpu.sh: unknown option --fast; see --help\n"),
        (["--out"], "gpu.sh: --out needs a value\n"),
        (["--liger", "no.whl"], "gpu.sh: --liger: there is no file no.whl\n"),
    ],
)
def test_a_mistake_is_said(arguments, line):
    done = script(*arguments)
    assert (done.returncode, done.stderr) == (2, line)


def test_the_page_runs_here_too(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), flags=re.DOTALL)
    exec(block, {})
    assert "distillation (" in capsys.readouterr().out


def test_a_table_of_a_gpu_is_made_of_what_was_measured():
    found = synthetic()
    for case in found["cases"]:
        case["floor"] = "copy"
    del found["cases"][0]["implementations"]["ours"]
    found["steps"] = [{"step": "memcheck", "status": 9, "seconds": 1.0}]
    assert of_gpu(found).endswith("Nothing ran. Steps that failed: memcheck.")
    run = {"commit": None, "dirty": None, "date": "2026-11-23T00:00:00", "copy_gb_per_s": 3000.0}
    found |= {**run, "machine": {"gpu": "NVIDIA H100"}, "versions": {"torch": "2.11.0"}}
    lines = of_gpu(found).splitlines()
    name = "distillation_loss forward_kl bfloat16 N=8192 V=128256"
    assert f"| {name} | 2.1 | 2.1 | 3.6 | 0 | 47.1 | 23.8 | 95.2 |" in lines
    assert (
        "Medians on NVIDIA H100, torch 2.11.0, no commit, 2026-11-23; a copy runs at 3000 GB/s" in lines[-1]
    )


def test_every_operator_has_a_step_and_a_family_and_every_bar_a_case():
    assert sorted(op for ops in STEPS.values() for op in ops) == sorted(OPERATORS)
    assert set(FAMILY) == set(OPERATORS)
    assert set(FAMILY.values()) <= set(operators())
    names = [case.name for case in chosen(tuple(OPERATORS), "cuda")]
    assert len(set(names)) == len(names)
    assert set(GPU) <= set(names)


def synthetic():
    """Every case as fast as its bar."""

    def entry(ms):
        return {"median_ms": ms}

    cases = []
    for case in chosen(tuple(OPERATORS), "cuda"):
        times = {"ours": 1.0, **GPU.get(case.name, {}), "eager": 99.0, "compile": 50.0, "liger": 200.0}
        cases.append({"name": case.name, "counted_bytes": 1, "copy_gb_per_s": 1.0})
        cases[-1]["implementations"] = {name: entry(ms) for name, ms in times.items()}
    return {"schema": SCHEMA, "device": "cuda", "cases": cases, "steps": []}


def test_the_bars_of_a_gpu_pass_and_fail(tmp_path, capsys):
    path, found = tmp_path / "gpu.json", synthetic()
    record.save(path, found)
    assert main(["bars", str(path)]) == 0
    assert (
        "native 2.1 ms, triton 3.6 ms, PyTorch takes 47.1x, torch.compile takes 23.8x"
        in capsys.readouterr().out
    )

    name = "distillation_loss forward_kl bfloat16 N=8192 V=128256"
    (loss,) = (case for case in found["cases"] if case["name"] == name)
    loss["implementations"]["native"] = {"failed": "out of memory"}
    loss["implementations"]["triton"]["median_ms"] = 3.7
    small = next(case for case in found["cases"] if "N=1 V=100" in case["name"])
    small["implementations"]["compile"]["median_ms"] = 0.9
    assert [f"{bar.what}: {bar.measured}" for bar in bars(found) if not bar.passes] == [
        f"{name}: native in at most 2.1 ms on an H100: not measured: out of memory",
        f"{name}: triton in at most 3.6 ms on an H100: 3.7 ms, PyTorch takes 26.8x, "
        "torch.compile takes 13.5x, liger takes 54.1x",
        f"{small['name']}: never slower than compile: 1.11 of its time",
    ]


def test_a_step_is_noted_where_nothing_was_measured(tmp_path):
    path = tmp_path / "gpu.json"
    for status in (9, 0):
        arguments = ["note", "build", str(status), "12.34", "--said", "its time was up", "--out", str(path)]
        assert main(arguments) == 0
    found = json.loads(path.read_text())
    assert found["steps"] == [{"step": "build", "status": 0, "seconds": 12.3, "said": "its time was up"}]
    assert found["schema"] == SCHEMA


def test_what_two_steps_measured_is_joined_and_the_later_counts():
    def measured(**cases):
        entries = [{"name": name, "copy": value} for name, value in cases.items()]
        return {"schema": SCHEMA, "seconds": 2.0, "skipped": {}, "cases": entries}

    both = record.joined({**measured(a=1, b=1), "steps": [1]}, measured(b=2, c=2))
    assert [(case["name"], case["copy"]) for case in both["cases"]] == [("a", 1), ("b", 2), ("c", 2)]
    assert both["seconds"] == 4.0
    assert both["steps"] == [1]


@pytest.mark.parametrize("of", ["logits", "TopK", "teacher head", "labels"])
def test_a_linear_loss_in_bfloat16_is_what_is_written_by_hand(of):
    contenders = linear.linear(of, 30, 16, 100, Setup("cpu", frozenset({"eager"})), dtype="bfloat16")
    assert set(check(of, "bfloat16", "cpu", contenders)) == {"ours", "products", "eager"}


def test_a_backend_by_name_is_the_one_that_runs(monkeypatch):
    """On a GPU; here the names are asked for, and what runs says which it is."""
    monkeypatch.setattr(
        "bench.measure.available_backends", lambda op, device: ("triton", "native", "reference")
    )
    ours = Contender("ours", lambda x: (named(None), x), lambda: (3,))
    assert by_backend("krum", ours, "cpu") == []
    found = by_backend("krum", ours, "cuda")
    assert [c.name for c in found] == ["triton", "native"]
    assert [c.run(*c.prepare()) for c in found] == [("triton", 3), ("native", 3)]
    assert named(None) == "auto"


def failing(*_):
    raise torch.cuda.OutOfMemoryError("more than there is")


def test_a_contender_that_fails_is_left_out():
    one, other = Contender("ours", lambda: torch.ones(3)), Contender("eager", lambda: torch.zeros(3))
    failures = {}
    peaks = check("x", "float32", "cpu", [one, Contender("sort", failing), other], failures)
    assert set(peaks) == {"ours"}
    assert failures["sort"] == "out of memory"
    assert failures["eager"].startswith("DisagreementError: x: eager differs from ours")


def test_a_case_without_room_for_its_inputs_says_so(monkeypatch):
    (case,) = chosen(("coordinate_median",), "cpu", only="C=5 n=1000")
    monkeypatch.setattr(aggregation, "_clients", failing)
    given = (Setup("cpu", frozenset({"eager"})), CpuClock(), copying("cpu", 1))
    found = measure(case, *given, box=0.01, go_on=True)
    assert found["implementations"] == {"ours": {"failed": "RuntimeError: out of memory"}}
    with pytest.raises(torch.cuda.OutOfMemoryError):
        measure(case, *given, box=0.01)
