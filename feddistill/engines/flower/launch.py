"""Start a run on Flower through its CLI, the only supported way, in subprocesses."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from feddistill import config as configuration
from feddistill.config import Config
from feddistill.config.data import RemotePartition
from feddistill.engines.flower import keeper
from feddistill.engines.flower.watch import Watch
from feddistill.errors import ConfigError, RunError
from feddistill.federation.protocol import RetryPolicy
from feddistill.progress import Progress
from feddistill.runs import experiment
from feddistill.store.layout import CONFIG, MESSAGES, OUTCOME, RESULT
from feddistill.store.run_directory import Json, RunDirectory, read_object

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # otherwise apps are installed from the internet
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray listens on every interface
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
NAME = "feddistill"
START_SECONDS = 180.0
REACH_SECONDS = 10.0
PORTS = 65535
POLL_SECONDS = 0.5
ASK_SECONDS = 20.0
"""Interval between queries of the run's status, seconds."""
LOOPBACK = ("127.0.0.1:", "localhost:", "[::1]:")


@dataclass(frozen=True, slots=True)
class Link:
    """The address of a SuperLink and its certificates."""

    address: str
    root_certificates: Path | None = None
    """``None`` for a SuperLink without TLS, which is accepted on loopback only."""


def train(
    config: Config,
    out: Path,
    link: Link | None,
    *,
    resume: bool,
    retry_policy: RetryPolicy,
    progress: Progress,
) -> Json:
    """Train with the SuperNodes connected to ``link``; without a link, in Flower's simulation.

    Its coordinator is another process on this machine; this one shows what happens, and ends it when it is
    interrupted itself.

    Raises:
        ConfigError: The settings cannot run so, or Flower is not installed.
        RunError: It did not complete; what there is of it can be resumed.
    """
    _needs(*(("ray", "flower-sim") if link is None else ("flwr", "flower")))
    config = experiment.resolve(config)
    if config.simulate.attack:
        raise ConfigError("simulate.attack needs the clients in one process: --engine local")
    remote = isinstance(config.data.partition, RemotePartition)
    if link is None and remote:
        raise ConfigError("data.partition remote needs remote clients: --engine flower")
    if link is not None:
        _reach(link)
    if not resume:
        RunDirectory.check_free(out)
    splits = experiment.check(config, progress)
    if link is None:
        with _folder() as folder, _superlink(folder) as (own, ended):
            federation = _resources(config, max(splits.places) + 1)
            _run(config, out, folder, own, resume, retry_policy, progress, federation, ended)
    else:
        with _folder() as folder:
            _run(config, out, folder, link, resume, retry_policy, progress, None)
    return read_object(out / RESULT)


def _reach(link: Link) -> None:
    """Check that something listens there: Flower's command retries for minutes without a message.

    Raises:
        ConfigError: Nothing answers there, or it is on a network and has no certificate.
    """
    host, _, port = link.address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > PORTS:
        raise ConfigError(f"--superlink {link.address} is not HOST:PORT")
    if link.root_certificates is None and not link.address.startswith(LOOPBACK):
        raise ConfigError(f"--superlink {link.address} is on a network and needs --root-certificates")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"--superlink {link.address}: nothing answers there: {error}") from None


def _resources(config: Config, clients: int) -> Json:
    """Number of clients that run at once: one per processor."""
    cores = os.cpu_count() or 1
    each = min(config.threads or 1, cores)
    return {
        "num-supernodes": clients,
        "client-resources-num-cpus": each,
        "init-args-num-cpus": cores // each * each,
    }


def _needs(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"this engine needs the package {package}: pip install 'feddistill[{extra}]'")


@contextmanager
def _folder() -> Iterator[Path]:
    """The folder through which the command and the coordinator's process communicate."""
    folder = Path(tempfile.mkdtemp(prefix="feddistill-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    config: Config,
    out: Path,
    folder: Path,
    link: Link,
    resume: bool,
    retry_policy: RetryPolicy,
    progress: Progress,
    federation: Mapping[str, Any] | None,
    ended: Callable[[], bool] = lambda: False,
) -> None:
    """Submit the run and show its progress until it ends; ``ended`` is true once the SuperLink has ended.

    Raises:
        RunError: It did not complete; what there is of it can be resumed.
    """
    out = out.resolve()
    (folder / CONFIG).write_text(configuration.dump(config), encoding="utf-8")
    told = {
        "config": str((folder / CONFIG).resolve()),
        "folder": str(folder.resolve()),
        "out": str(out),
        "cwd": str(Path.cwd()),
        "state": str(folder / "clients") if federation is None else str(out / "clients"),
        "engine": "flower" if federation is None else "flower-sim",
        "resume": resume,
        "connect": retry_policy.connect,
        "reply": retry_policy.reply,
        "attempts": retry_policy.attempts,
    }
    flower = _Cli(folder, link)
    run = flower.submit(told, federation)
    watch = Watch(out, folder / MESSAGES, progress)
    try:
        status, asked = "", time.monotonic()
        while not status.startswith("finished"):
            watch.look()
            time.sleep(POLL_SECONDS)
            if ended():
                raise RunError(f"Flower's SuperLink ended: {_last_lines(folder / 'superlink.log')}")
            # Flower's command takes seconds of CPU; the coordinator writes its outcome when it is done.
            if (folder / OUTCOME).exists() or time.monotonic() - asked > ASK_SECONDS:
                status, asked = flower.status(run), time.monotonic()
        watch.look()
    except BaseException:
        with suppress(RunError):
            flower.stop(run)
        raise
    finally:
        watch.close()
    if not status.startswith("finished:completed"):
        raise RunError(f"{_why(folder, status)}; go on with: feddistill train --resume --out {out}")


def _why(folder: Path, status: str) -> str:
    path = folder / OUTCOME
    told: Json = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return str(told.get("error") or f"Flower says {status}, {_last_lines(folder / 'superlink.log')}")


def _last_lines(path: Path, count: int = 5) -> str:
    if not path.exists():
        return "see the SuperLink's log"
    return " / ".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


class _Cli:
    """Flower's command with its own home folder."""

    def __init__(self, folder: Path, link: Link):
        self.folder = folder
        self.environment = environment(folder / "home")
        secure = (
            f'root-certificates = "{link.root_certificates.resolve()}"'
            if link.root_certificates
            else "insecure = true"
        )
        (folder / "home").mkdir(exist_ok=True)
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "{link.address}"\n{secure}\n',
            encoding="utf-8",
        )

    def submit(self, told: Mapping[str, Any], federation: Mapping[str, Any] | None) -> str:
        """Start a run; returns its id."""
        settings = self.folder / "run.toml"
        settings.write_text(
            "".join(f"{key} = {_toml(value)}\n" for key, value in told.items()), encoding="utf-8"
        )
        with as_file(files("feddistill.engines.flower").joinpath("app")) as app:
            command = ["run", str(app), NAME, "--run-config", str(settings), "--format", "json"]
            if federation:
                given = " ".join(f"{key}={_toml(value)}" for key, value in federation.items())
                command += ["--federation-config", given]
            found = self._said(command)
        if not found.get("run-id"):
            raise RunError(f"Flower rejected the run: {found.get('error-message') or found}")
        return str(found["run-id"])

    def status(self, run: str) -> str:
        """Status of a run: ``running``, ``finished:completed``, ...; the CLI's exit status does not tell."""
        runs = self._said(["list", NAME, "--run-id", run, "--format", "json"]).get("runs") or [{}]
        return str(runs[0].get("status", "unknown"))

    def stop(self, run: str) -> None:
        """Stop a run."""
        self._said(["stop", run, NAME, "--format", "json"])

    def _said(self, command: list[str]) -> Json:
        followed = [sys.executable, "-I", keeper.__file__, "follow", program("flwr"), *command]
        done = subprocess.run(followed, env=self.environment, capture_output=True, text=True, check=False)
        start = done.stdout.find("{")
        with suppress(ValueError):
            found: Json = json.loads(done.stdout[start:]) if start >= 0 else {}
            return found
        return {"error-message": (done.stdout + done.stderr).strip()[-500:]}


@contextmanager
def _superlink(folder: Path) -> Iterator[tuple[Link, Callable[[], bool]]]:
    """A SuperLink for one simulation on a free loopback port, and a function that tells if it has ended.

    Nothing of it is left afterwards, nor when this process is killed.
    """
    home = folder / "home"
    home.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-I", keeper.__file__, "keep", str(folder)]
    command += [program("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-runtime-dependency-installation"]
    log = folder / "superlink.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment(home),
            stdin=subprocess.PIPE,  # closed when this process ends, in whatever way
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RunError(f"Flower's SuperLink did not start: {_last_lines(log)}")
            time.sleep(0.2)
        yield Link(f"127.0.0.1:{port}"), lambda: process.poll() is not None
    finally:
        process.communicate()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
            return True
    except (OSError, urllib.error.URLError):
        return False


def program(name: str) -> str:
    """Path of a Flower program in this virtual environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else (shutil.which(name) or name)


def environment(home: Path) -> dict[str, str]:
    """Environment of Flower's programs: they start each other by name and keep their state in ``home``."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # glibc keeps a heap for each of many threads; with two, a server's memory stays near what it uses.
    few = {"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "2")}
    return {**os.environ, **QUIET, **few, "FLWR_HOME": str(home), "PATH": path}


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, str) else str(value)
