"""A federation on the loopback, started by the very files that ``feddistill deploy init`` writes."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from feddistill.engines.flower import deployment

START_SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


class Federation:
    """A SuperLink, its SuperExec and SuperNodes: processes, each in a group of its own."""

    def __init__(self, folder: Path, clients: list[str]):
        self.folder, self.clients = folder, clients
        self.port = free_port()
        deployment.write(folder, clients, "127.0.0.1", runtime_port=self.port)
        self.server = folder / "server"
        self.certificates = self.server / "certificates" / "ca.crt"
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Federation":
        self.start_server()
        for name in self.clients:
            self.make_key(name)
            self.enrol(name)
            self.start_node(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.stop(name)

    def start(self, name: str, script: Path) -> None:
        self._open(name, [str(script)])

    def start_server(self) -> None:
        self.start_link()
        self.start("superexec", self.server / "superexec.sh")

    def start_link(self) -> None:
        self.start("superlink", self.server / "superlink.sh")
        end = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert time.monotonic() < end, self.log("superlink")
            time.sleep(0.2)

    def make_key(self, name: str) -> None:
        subprocess.run([self.node(name) / "make-key.sh"], env=environment(), check=True)

    def enrol(self, name: str) -> None:
        command = [self.server / "enrol.sh", name, self.node(name) / "node.key.pub"]
        subprocess.run(command, env=environment(), check=True, capture_output=True)

    def start_node(self, name: str) -> None:
        self.start(name, self.node(name) / "supernode.sh")

    def node(self, name: str) -> Path:
        return self.folder / "clients" / name

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        """A process and all that it has started."""
        process = self.processes.pop(name)
        for number in (how, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def train(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        """``train.sh``, to its end."""
        command = [self.server / "train.sh", *map(str, arguments)]
        return subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=False, **options
        )

    def begin(self, *arguments: object) -> None:
        """``train.sh`` in the background."""
        self._open("train", [str(self.server / "train.sh"), *map(str, arguments)])

    def _open(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
