"""One configuration, three engines, the same bytes. Where Flower is: ``pytest tests/engines -m flower``."""

import json
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from federation import Federation, environment

import feddistill.engines.flower
from feddistill.store.run_directory import Json

pytest.importorskip("flwr", reason="pip install 'feddistill[flower]'")
pytestmark = pytest.mark.flower

ENOUGH_SECONDS = 600


def train(config: Path, out: Path, *arguments: str) -> Path:
    command = [Path(sys.executable).with_name("feddistill"), "train", config, "--out", out, *arguments]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=ENOUGH_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def local(tiny, tmp_path_factory) -> Path:
    return train(tiny, tmp_path_factory.mktemp("runs") / "local")


def decisions(run: Path) -> Json:
    """Bytes of all payloads, digests of all teachers, figures of all students, and what travelled."""
    result = json.loads((run / "result.json").read_text())
    payloads = {
        str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("rounds/*/payloads/*"))
    }
    assert payloads
    return {
        "payloads": payloads,
        "ledger": json.loads((run / "ledger.json").read_text()),
        "metrics": result["metrics"],
        "by_round": result["by_round"],
        "bytes": result["bytes"],
        "flops": result["flops"],
    }


def test_supernodes_give_what_one_process_gives(federation, tiny, local, tmp_path):
    done = federation.train(tiny, "--out", tmp_path / "flower", timeout=ENOUGH_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr + federation.log("superexec")
    assert decisions(tmp_path / "flower") == decisions(local)
    for name in federation.clients:  # each has its own state, and nobody else's
        folders = [path.name for path in (federation.node(name) / "state").iterdir()]
        assert folders == [name]


def test_flwr_run_on_the_app_folder_gives_the_same(federation, tiny, local, tmp_path):
    app = Path(feddistill.engines.flower.__file__).with_name("app")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{federation.port}"\n'
        f'root-certificates = "{federation.certificates}"\n'
    )
    out = tmp_path / "run"
    told = f'config="{tiny}" out="{out}"'
    command = [Path(sys.executable).with_name("flwr"), "run", app, "here", "--run-config", told]
    flower = environment() | {"FLWR_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=flower, capture_output=True, text=True, check=False)
    end = time.monotonic() + ENOUGH_SECONDS
    while not (out / "result.json").exists():
        assert time.monotonic() < end, done.stdout + done.stderr + federation.log("superexec")
        time.sleep(0.5)
    assert decisions(out) == decisions(local)


def test_the_simulation_gives_what_one_process_gives(tiny, local, tmp_path):
    pytest.importorskip("ray", reason="pip install 'feddistill[flower-sim]'")
    assert decisions(train(tiny, tmp_path / "sim", "--engine", "flower-sim")) == decisions(local)


def test_fedavg_is_flowers_own(tiny, tmp_path):
    """Its strategy over the same clients: what one process computes, but for the last digits."""
    pytest.importorskip("ray", reason="pip install 'feddistill[flower-sim]'")
    more = ("--set", "baselines=[fedavg]")
    here = train(tiny, tmp_path / "local", *more)
    there = train(tiny, tmp_path / "sim", "--engine", "flower-sim", *more)
    mine, its = (json.loads((run / "result.json").read_text()) for run in (here, there))
    assert its["metrics"]["student"] == mine["metrics"]["student"]
    for figure in ("accuracy", "macro_f1"):
        assert its["metrics"]["fedavg"][figure] == pytest.approx(mine["metrics"]["fedavg"][figure], abs=0.02)
    assert its["flops"]["baseline_fedavg"] == mine["flops"]["baseline_fedavg"]
    sent, counted = (found["bytes"]["baselines"]["fedavg"] for found in (its, mine))
    for way in ("uplink", "downlink"):
        assert counted[way] < sent[way] < 1.01 * counted[way]  # Flower's headers of arrays are counted too


def test_an_unregistered_key_is_refused(federation, tmp_path):
    """A SuperNode with a key of its own making, and the right certificate."""
    stranger = Federation(tmp_path / "stranger", ["client-9"])
    stranger.make_key("client-9")
    script = stranger.node("client-9") / "supernode.sh"
    text = script.read_text().replace(f":{stranger.port}", f":{federation.port}")
    script.write_text(text.replace("--port 9094", "--port 9199"))
    (stranger.node("client-9") / "ca.crt").write_bytes(federation.certificates.read_bytes())
    again = "not let in"
    stranger.start("client-9", script)
    try:
        time.sleep(30)
        refused = stranger.log("client-9").count(again)
        assert refused >= 2
        enrol = [federation.server / "enrol.sh", "client-9", stranger.node("client-9") / "node.key.pub"]
        subprocess.run(enrol, env=environment(), check=True, capture_output=True)
        time.sleep(20)  # it was the key that was missing, and nothing else
        let_in = stranger.log("client-9").count(again)
        time.sleep(20)
        assert stranger.log("client-9").count(again) == let_in
        assert stranger.processes["client-9"].poll() is None
    finally:
        stranger.stop("client-9")


LISTENS = "0A"  # /proc/net/tcp: the state
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def open_ports() -> set[str]:
    """Where something listens beyond the loopback, as ``ss -ltn`` would show it."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTENS and local.split(":")[0] not in LOOPBACK:
                found.add(local)
    return found


class Marked:
    """A simulation whose processes are told from others by a variable that they inherit."""

    def __init__(self, config: Path, out: Path):
        self.mark = f"FEDDISTILL_TEST={uuid.uuid4()}"
        self.agents = self._found(b"ray::", b"Agent")
        name, value = self.mark.split("=")
        program = Path(sys.executable).with_name("feddistill")
        command = [program, "train", config, "--engine", "flower-sim", "--out", out, "--quiet"]
        self.errors = out.with_suffix(".errors")
        with self.errors.open("wb") as file:
            self.run = subprocess.Popen(command, env=environment() | {name: value}, stderr=file)

    def __enter__(self) -> "Marked":
        return self

    def __exit__(self, *_: object) -> None:
        self.run.kill()
        self.run.wait()

    def processes(self) -> set[int]:
        """Beside the command itself; the titles of Ray's agents have overwritten what they inherited."""
        found = self._found(self.mark.encode(), where="environ")
        return (found | self._found(b"ray::", b"Agent") - self.agents) - {self.run.pid}

    def assert_gone(self) -> None:
        end = time.monotonic() + 60
        while self.processes() and time.monotonic() < end:
            time.sleep(0.5)
        assert not self.processes()

    @staticmethod
    def _found(*parts: bytes, where: str = "cmdline") -> set[int]:
        found = set()
        for path in Path("/proc").glob(f"[0-9]*/{where}"):
            with suppress(OSError):
                text = path.read_bytes()
                if all(part in text for part in parts):
                    found.add(int(path.parent.name))
        return found


def test_a_simulation_listens_on_the_loopback_alone_and_leaves_nothing(tiny, tmp_path):
    pytest.importorskip("ray", reason="pip install 'feddistill[flower-sim]'")
    before = open_ports()
    most = 0
    with Marked(tiny, tmp_path / "sim") as made:
        while made.run.poll() is None:
            assert open_ports() <= before
            most = max(most, len(made.processes()))
            time.sleep(0.5)
        assert made.run.returncode == 0, made.errors.read_text()
    assert most > 5  # there was something to look at
    made.assert_gone()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_simulation_whose_command_is_ended_leaves_nothing(how, tiny, tmp_path):
    pytest.importorskip("ray", reason="pip install 'feddistill[flower-sim]'")
    with Marked(tiny, tmp_path / "sim") as made:
        end = time.monotonic() + 300
        while not (tmp_path / "sim" / "federation.jsonl").exists():
            assert made.run.poll() is None, made.errors.read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        assert len(made.processes()) > 5
        made.run.send_signal(how)
        made.run.wait(120)
    made.assert_gone()
    if how == signal.SIGKILL:
        train(tiny, tmp_path / "sim", "--resume", "--engine", "flower-sim")
        assert (tmp_path / "sim" / "result.json").exists()
