"""The command line, as a person uses it: in a process of its own."""

import json
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from feddistill.cli import COMMANDS, main


def feddistill(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "feddistill.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def here(*arguments):
    """The same in this process, which has imported everything already."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="feddistill")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_help_names_every_command_and_is_quick():
    start = time.perf_counter()
    done = feddistill("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert time.perf_counter() - start < 5, "no torch import: half a second on an idle machine"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = here(command, "--help")
    assert done.exit_code == 0
    assert "Usage: feddistill " + command in done.stdout


def paths(command):
    """Every parameter of a command, or of a command of a group, that is a path."""
    if isinstance(command, click.Group):
        return [pair for name in command.commands for pair in paths(command.commands[name])]
    return [(command, parameter) for parameter in command.params if isinstance(parameter.type, click.Path)]


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir()
    commands = [main.get_command(click.Context(main), name) for name in COMMANDS]
    found = [pair for command in commands for pair in paths(command)]
    assert len(found) > 20
    for command, parameter in found:
        monkeypatch.setattr(parameter.type, "file_okay", True)
        monkeypatch.setattr(parameter.type, "dir_okay", True)
        value = parameter.type.convert("~/there", parameter, click.Context(command))
        assert value == tmp_path / "there", (command.name, parameter.name)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--set", "distill.temprature=4"], "did you mean distill.temperature?"),
        (["train", "absent.yaml"], "cannot read absent.yaml: No such file or directory"),
        (["train", "--resume"], "--resume needs --out DIR"),
        (["train", "--resume", "--out", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere is not a run"),
        (["report", "nowhere"], "nowhere is not a run"),
        (["aggregate", "nowhere", "--rule", "median"], "nowhere is not a run"),
        (["distill", "nowhere"], "nowhere is not a run"),
        (["forget", "nowhere", "--client", "client-0"], "nowhere is not a run"),
        (["verify", "nowhere"], "nowhere is not a run"),
        (["inspect", "nowhere"], "nowhere"),
        (
            ["config", "check", "--set", "rounds=0"],
            "rounds: input should be greater than or equal to 1, got 0",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = here(*arguments)
    assert done.exit_code == 2, done.stderr
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_show_prints_every_default():
    done = feddistill("config", "show", "--set", "rounds=7")
    assert "rounds: 7" in done.stdout
    assert "temperature:" in done.stdout


def test_check_reads_the_data_and_shows_the_skew():
    done = here("config", "check")
    assert done.exit_code == 0, done.stderr
    assert "client-3" in done.stdout
    assert "non-IID" in done.stdout


def test_plan_says_what_a_run_would_cost_and_writes_nothing(tiny_file, tmp_path, monkeypatch):
    there = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    done = here("plan", tiny_file)
    assert done.exit_code == 0, done.stderr
    assert "FedAvg" in done.stdout
    assert "clients_train" in done.stdout
    assert set(tmp_path.iterdir()) == there
    found = json.loads(here("plan", tiny_file, "--json").stdout)
    assert found["bytes"]["codecs"][found["bytes"]["chosen"]]["upload"] > 0


def test_kernels_says_what_runs_here():
    done = here("kernels")
    assert done.exit_code == 0, done.stderr
    assert "reference" in done.stdout


def test_a_run_from_the_first_command_to_the_last(tiny_file, tmp_path):
    out = tmp_path / "run"
    done = feddistill("train", tiny_file, "--set", "baselines=[public_only]", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr  # of Triton's bindings, if what is frozen stays
    assert "student (feddistill)" in done.stdout
    for name in (
        "result.json",
        "report.html",
        "rounds.csv",
        "metrics.csv",
        "config.yaml",
        "figures/skew.svg",
    ):
        assert (out / name).is_file()
    assert list((out / "tensorboard").iterdir())
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5
    assert "://" not in page.replace("http://www.w3.org/", ""), "the page needs nothing from elsewhere"
    assert "student (feddistill)" in page

    evaluated = here("evaluate", out)
    assert evaluated.exit_code == 0, evaluated.stderr
    assert "accuracy" in evaluated.stdout

    shown = here("inspect", next(iter(sorted(out.glob("rounds/001/payloads/*.safetensors")))))
    assert shown.exit_code == 0, shown.stderr
    assert "client-0" in shown.stdout

    anew = here("aggregate", out, "--rule", "median")
    assert anew.exit_code == 0, anew.stderr
    assert "teacher's accuracy" in anew.stdout
    learned = here("distill", tmp_path / "run-aggregated", "--out", tmp_path / "learned")
    assert learned.exit_code == 0, learned.stderr
    assert "median" in (tmp_path / "learned/report.html").read_text()
    without = here("forget", out, "--client", "client-1")
    assert without.exit_code == 0, without.stderr
    verified = here("verify", tmp_path / "run-without-client-1", "--recompute")
    assert verified.exit_code == 0, verified.stdout + verified.stderr
    assert "WRONG" not in verified.stdout
    damaged = out / "rounds/001/teacher.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    wrong = here("verify", out, "--quiet")
    assert wrong.exit_code == 1
    assert wrong.stdout.splitlines() == ["WRONG round 1: the teacher is intact"]

    again = here("train", tiny_file, "--out", out)
    assert again.exit_code == 2
    assert "already exists; go on with --resume" in again.stderr
    assert here("train", "--resume", "--out", out).exit_code == 0
