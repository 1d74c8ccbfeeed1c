"""The benchmarks: what they compare, count, keep and refuse.  Nothing here asserts a time."""

import ast
import json
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import feddistill.cli
from bench import machine
from bench.__main__ import main
from bench.cases import OPERATORS, Setup, aggregation, chosen, compression, linear, losses
from bench.measure import check
from bench.names import FAMILIES, FAMILY
from bench.run import SCHEMA
from bench.tables import README
from bench.timing import Contender, DisagreementError, check_agreement, peak_extra_bytes

ROOT = Path(__file__).parents[1]
KINDS = ("forward_kl", "reverse_kl", "jsd", "forward_kl and labels", "forward_kl in place")

TINY = {
    "distillation_loss": [
        *(
            partial(losses.loss, kind, dtype, 3, 50, False)
            for kind in KINDS
            for dtype in ("float32", "float16")
        ),
        partial(losses.topk_loss, "float16", 3, 50, 5, False),
    ],
    "softmax_divergence": [partial(losses.divergence, "bfloat16", 3, 50)],
    "topk_compress": [partial(compression.compress, "float32", 3, 50, 5, False)],
    "coordinate_median": [partial(aggregation.median, "float32", count, 50) for count in (4, 5)],
    "trimmed_mean": [partial(aggregation.trimmed, "bfloat16", 5, 50, 1)],
    "geometric_median": [partial(aggregation.distances, "geometric_median", "float32", 3, 50)],
    "krum": [partial(aggregation.distances, "krum", "float32", 3, 50)],
    "nearest_neighbour_mixing": [
        partial(aggregation.distances, "nearest_neighbour_mixing", "float32", 3, 50)
    ],
    "aggregate_topk": [partial(aggregation.answers, rule, 4, 3, 50, 5) for rule in ("median", "mean_probs")],
    "linear_distillation_loss": [
        partial(linear.linear, of, 3, 8, 100) for of in ("logits", "TopK", "labels")
    ],
}


@pytest.fixture
def setup():
    return Setup("cpu", frozenset(FAMILIES) - {"compile"})


def bench(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("op", OPERATORS)
def test_others_compute_what_ours_does(op, setup):
    for make in TINY[op]:
        contenders = make(setup)
        assert len(contenders) > 1
        dtype = next((a for a in make.args if a in ("float16", "bfloat16")), "float32")
        check(op, dtype, "cpu", contenders)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (torch.tensor([1.0, 2.2]), r"x differs from ours: relative error 0.089 in output 0, allowed 0.01"),
        (torch.tensor([1.0, torch.nan]), "relative error nan"),
        (torch.tensor([1.0]), r"x gives shapes \[\[1\]\], ours \[\[2\]\]"),
    ],
)
def test_a_contender_that_computes_something_else_is_refused(given, line):
    with pytest.raises(DisagreementError, match=line):
        check_agreement("x", [given], [torch.tensor([1.0, 2.0])], 0.01)


def test_names_are_unique_and_every_operator_has_cases():
    names = [case.name for case in chosen(tuple(OPERATORS), "cpu")]
    assert list(FAMILY) == list(OPERATORS)
    assert len(set(names)) == len(names)
    assert set(README) <= set(names)
    assert all(chosen((op,), "cpu") and chosen((op,), "cuda") for op in OPERATORS)


@pytest.mark.parametrize(
    "case", chosen(("distillation_loss",), "cpu", only="float32 N=64 V=1000"), ids=lambda c: c.name
)
def test_a_loss_counts_what_it_must_read_and_write(case, setup):
    logits = 64 * 1000 * 4
    assert case.counted_bytes == (2 if "TopK" in case.variant else 3) * logits


def test_a_median_counts_its_clients_and_its_result(setup):
    (case,) = chosen(("coordinate_median",), "cpu", only="C=5 n=1000")
    (ours, *_) = case.contenders(setup)
    (xs,) = ours.run.args
    assert case.counted_bytes == sum(x.nbytes for x in xs) + ours.run().nbytes


def test_memory_of_a_call_is_seen():
    _, extra = peak_extra_bytes(Contender("ones", lambda: torch.ones(1 << 22)), "cpu")
    if extra is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 15 << 20 <= extra < 1 << 26


def test_a_run_is_kept_drawn_and_held_against_the_bars(tmp_path):
    out = tmp_path / "result.json"
    arguments = ["coordinate_median", "--only", "C=5 n=1000", "--quick", "--out", str(out)]
    done = CliRunner().invoke(feddistill.cli.main, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    assert "torch.median" in done.output
    found = json.loads(out.read_text())
    assert found["schema"] == SCHEMA
    assert found["copy_gb_per_s"] > 0
    (case,) = found["cases"]
    ours = case["implementations"]["ours"]
    assert set(ours) == {"median_ms", "quartiles_ms", "min_ms", "runs", "peak_extra_bytes"}
    assert ours["min_ms"] <= ours["quartiles_ms"][0] <= ours["median_ms"] <= ours["quartiles_ms"][1]

    done = bench("--draw", out)
    assert done.exit_code == 0, done.output
    for name in ("time", "bandwidth"):
        assert (tmp_path / f"result-{name}.svg").read_text().startswith("<?xml")

    done = bench("--check", out)
    assert done.exit_code == 1, "what was not measured fails"
    assert (
        "FAIL  topk_compress float32 N=256 V=128256 K=64: at most 3x its limit: not measured" in done.output
    )


def synthetic():
    """Every case as fast as it has to be."""
    entry = {"median_ms": 1.0, "quartiles_ms": [1.0, 1.0], "min_ms": 1.0, "runs": 3, "peak_extra_bytes": None}
    others = ("eager", "eager float32", "compile", "torch.median", "sort")
    cases = [
        {
            "name": case.name,
            "implementations": {"ours": entry, **{name: {**entry, "median_ms": 100.0} for name in others}},
            "limit_ms": 1.0,
        }
        for case in chosen(tuple(OPERATORS), "cpu")
    ]
    return {"schema": SCHEMA, "device": "cpu", "cases": cases}


def test_the_bars_pass_and_fail(tmp_path):
    path, found = tmp_path / "synthetic.json", synthetic()
    path.write_text(json.dumps(found))
    done = bench("--check", path)
    assert done.exit_code == 0, done.output
    assert done.output.endswith("\n0 missed\n")

    slow = next(c for c in found["cases"] if c["name"] == "topk_compress bfloat16 N=256 V=128256 K=64")
    slow["implementations"]["compile"]["median_ms"] = 5.9
    small = next(c for c in found["cases"] if c["name"] == "distillation_loss forward_kl float32 N=1 V=100")
    small["implementations"]["eager"]["median_ms"] = 0.9
    path.write_text(json.dumps(found))
    done = bench("--check", path)
    assert done.exit_code == 1
    assert [line for line in done.output.splitlines() if line.startswith("FAIL")] == [
        f"FAIL  {slow['name']}: 6x faster than eager or eager float32 or compile: 5.9x",
        f"FAIL  {small['name']}: never slower than eager: 1.11 of its time",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["topk_compres"], "'topk_compres' is not one of"),
        (["--compare", "eager,lieger"], "lieger; choose from eager, compile, liger"),
        (["--only", "C=99"], "no such case"),
        (["--check", "pyproject.toml"], "cannot read"),
        (["--draw", "docs/results/quickstart.json"], "cannot read"),
    ],
)
def test_a_mistake_is_said(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = bench(*arguments)
    assert done.exit_code == 2
    assert line in done.output


def test_a_peer_that_is_absent_is_named(setup, monkeypatch):
    monkeypatch.setattr("bench.baselines.find_spec", lambda name: None)
    aggregation.median("float32", 5, 10, setup)
    assert setup.skipped == {"byzfl": "not installed"}


def installed():
    """The files of bench/ that ``bench/__main__.py`` imports, found by reading the syntax trees."""
    found, left = set(), [ROOT / "bench" / "__main__.py"]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                named = [module, *(module / alias.name for alias in node.names)]
                files = [file for name in named for file in (name.with_suffix(".py"), name / "__init__.py")]
                left += [file for file in files if file.is_file()]
    return found


@pytest.mark.parametrize("path", sorted(installed()), ids=lambda path: path.stem)
def test_what_is_installed_runs_without_the_tree(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    names += [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    needed = {name for name in names if name.split(".")[0] in ("bench", "feddistill")}
    assert needed <= {"feddistill.cli.paths"}  # installed as well


def test_a_wheel_holds_what_the_command_imports_and_nothing_else():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    assert settings["wheel"]["packages"]["feddistill/bench"] == "bench"
    patterns = [pattern for line in settings["wheel"]["exclude"] for pattern in (line, f"{line}/*")]
    files = [path for path in (ROOT / "bench").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    kept = {p for p in files if not any(fnmatch(f"feddistill/{p.relative_to(ROOT)}", x) for x in patterns)}
    assert kept == installed()


@pytest.mark.parametrize(
    ("arguments", "folder", "name"),
    [
        (["-m", "bench"], ROOT, "python -m bench"),
        (["-m", "feddistill.bench"], "/", "python -m feddistill.bench"),
        (["-m", "feddistill.cli", "bench"], "/", "feddistill bench"),
    ],
)
def test_all_its_names_have_the_same_help(arguments, folder, name):
    done = subprocess.run(
        [sys.executable, *arguments, "--help"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {name} [OPTIONS] [OPERATOR]...\n")
    assert set(OPERATORS) <= set(done.stdout.replace(",", "").replace(".", "").split())


def test_the_commit_is_that_of_the_clone_and_of_no_repository_around_it(monkeypatch):
    if machine._git("rev-parse", "HEAD") is None:
        pytest.skip("this tree is no clone")
    assert len(machine._commit()[0]) == 40
    monkeypatch.setattr(machine, "ROOT", ROOT / "bench")
    assert machine._commit() == (None, None)
