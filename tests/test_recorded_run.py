"""A run that commit 3c6202b made (``recorded_run/``) is read as if it were new, but not resumed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from feddistill.cli import main
from feddistill.store import recipe

RECORDED = Path(__file__).parent / "recorded_run" / "run"
DIGEST = "75e37dfa342eb8e68871dd5874f66481"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(RECORDED, tmp_path / "run")


def feddistill(*arguments):
    done = CliRunner().invoke(main, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.stderr
    return done.stdout


def result_of(run):
    return json.loads((run / "result.json").read_text())


def contents(run):
    """What a run keeps, by name, but for its lock."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_reading_changes_nothing(run, tmp_path):
    before = contents(run)
    CliRunner().invoke(main, ["verify", str(run), "--recompute"])
    feddistill("compare", run)
    feddistill("evaluate", run)
    feddistill("inspect", run / "rounds/001/payloads/client-0.safetensors")
    feddistill("export", run, "--out", tmp_path / "student")
    feddistill("aggregate", run, "--out", tmp_path / "again")
    assert contents(run) == before == contents(RECORDED)


def test_every_finding_of_verify_is_right(run):
    lines = feddistill("verify", run).splitlines()
    assert len(lines) == 14
    assert all(line.startswith("ok   ") for line in lines)
    path = run / "rounds/002/payloads/client-3.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert CliRunner().invoke(main, ["verify", str(run)]).exit_code == 1


def test_its_payloads_give_its_teachers(run, tmp_path):
    lines = CliRunner().invoke(main, ["verify", str(run), "--recompute"]).stdout.splitlines()
    assert len(lines) == 16
    # The last two are about the bytes of the teachers: processors differ in the last digit of a logarithm.
    assert all(line.startswith("ok   ") for line in lines[:-2])
    feddistill("aggregate", run, "--out", tmp_path / "again")
    feddistill("verify", tmp_path / "again", "--recompute")


def test_the_report_has_the_recorded_metrics(run):
    feddistill("report", run)
    table = (run / "metrics.csv").read_text()
    metrics = result_of(RECORDED)["metrics"]
    for who in ("student", "public_only"):
        assert str(metrics[who]["cross_entropy"]) in table
    assert (run / "report.html").stat().st_size > 20_000
    kept = contents(run)
    assert all(kept[name] == content for name, content in contents(RECORDED).items())


def test_compare_has_the_recorded_metrics(run):
    (row,) = json.loads(feddistill("compare", run, "--json"))
    accuracy = result_of(RECORDED)["metrics"]["student"]["accuracy"]
    assert any(isinstance(value, dict) and accuracy in value.values() for value in row.values())


def test_the_student_is_the_one_that_was_trained(run, tmp_path):
    found = json.loads(feddistill("evaluate", run, "--json"))
    wanted = result_of(RECORDED)["metrics"]["student"]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    feddistill("export", run, "--out", tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"{wanted['accuracy']:.3f}" in card


def test_a_payload_is_inspected_by_its_request(run):
    path = run / "rounds/002/payloads/client-3.safetensors"
    shown = feddistill("inspect", path, "--spec", run / "rounds/002/spec.json")
    assert "well-formed" in shown
    assert DIGEST[:16] in shown
    assert "sampled" in shown


def test_other_teachers_are_made_of_its_answers(run, tmp_path):
    feddistill("aggregate", run, "--out", tmp_path / "same")
    feddistill("aggregate", run, "--set", "aggregation.sharpen=2", "--out", tmp_path / "sharp")
    for number in ("001", "002"):
        name = f"rounds/{number}/teacher.safetensors"
        recorded, same, sharp = (
            load_file(root / name) for root in (RECORDED, tmp_path / "same", tmp_path / "sharp")
        )
        assert same.keys() == recorded.keys()
        for key, values in recorded.items():
            assert np.allclose(same[key], values, rtol=0, atol=1e-6)
            assert not np.allclose(sharp[key], values, atol=0.1)


def test_a_client_is_forgotten(run, tmp_path):
    out = tmp_path / "without"
    feddistill("forget", run, "--client", "client-0", "--out", out)
    result = result_of(out)
    assert result["metrics"]["student"].keys() == result_of(RECORDED)["metrics"]["student"].keys()
    assert [(step["command"], step["recipe"]) for step in result["provenance"]["steps"]] == [("forget", 1)]
    assert result["recipe"] == recipe.NUMBER
    assert [set(one["uplink"]) for one in result["bytes"]["by_round"]] == [{"client-1", "client-3"}] * 2
    feddistill("verify", out)
    stored = contents(RECORDED)["rounds/001/payloads/client-1.safetensors"]
    assert contents(out)["rounds/001/payloads/client-1.safetensors"] == stored


@pytest.mark.parametrize("gone", [(), ("result.json",), ("result.json", "records/rounds/002.json")])
def test_it_is_not_resumed_with_another_recipe_of_training(run, gone):
    for name in gone:
        (run / name).unlink()
    before = contents(run)
    done = CliRunner().invoke(main, ["train", "--resume", "--quiet", "--out", str(run)])
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"feddistill: {run} was started with recipe 1 of training, this version has recipe {recipe.NUMBER}: "
        "it cannot be resumed, only read; start a new run, or use the version of feddistill that started it"
    ]
    assert contents(run) == before
