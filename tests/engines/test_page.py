"""A newcomer copies the commands of ``docs/deployment.md``."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from federation import environment

pytest.importorskip("flwr", reason="pip install 'feddistill[flower]'")
pytestmark = pytest.mark.flower

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
NAMES = ("north", "south", "east")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    (commands,) = re.findall(r"<!-- commands -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with (folder / "terminal.log").open("wb") as log:
        shell = subprocess.Popen(
            ["bash", "-e", "-c", commands],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert shell.wait(1800) == 0, (folder / "terminal.log").read_text()
        yield folder
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


def test_the_commands_give_a_finished_run(deployed):
    run = deployed / "federation/server/runs/first"
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "complete"
    assert (run / "report.html").exists()
    assert not result["missing"]
    student, alone = (result["metrics"][name]["accuracy"] for name in ("student", "public_only"))
    assert student > alone  # it learned something of the three
    for name in NAMES:
        assert (run / f"rounds/002/payloads/{name}.safetensors").exists()


def test_nobodys_texts_are_at_the_server(deployed):
    texts = [
        line.split(",", 1)[0].strip('"')
        for name in NAMES
        for line in (deployed / f"federation/clients/{name}/private.csv").read_text().splitlines()[1:50]
    ]
    long = [text.encode() for text in texts if len(text) > 30]
    assert len(long) > 50
    for path in (deployed / "federation/server").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(text in content for text in long), path


def test_one_process_gives_the_same_teacher(deployed, tmp_path):
    """The institutions' files as ``partition: given``: only the run's name is another one."""
    import yaml

    settings = yaml.safe_load((deployed / "federation/server/config.yaml").read_text())
    sources = {
        name: {"kind": "files", "path": str(deployed / f"federation/clients/{name}/private.csv")}
        for name in NAMES
    }
    settings["data"]["partition"] = {"kind": "given", "sources": sources}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = ["feddistill", "train", tmp_path / "given.yaml", "--out", tmp_path / "run", "--quiet"]
    subprocess.run(command, env=environment(), check=True)
    run = deployed / "federation/server/runs/first"
    for number in (1, 2):
        name = f"rounds/{number:03d}/teacher.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    here, there = (json.loads((path / "result.json").read_text()) for path in (tmp_path / "run", run))
    assert here["metrics"]["student"] == there["metrics"]["student"]
