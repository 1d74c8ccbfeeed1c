"""``python -m tests.engines.faults``: do to a federation what machines do to it, and say what came of it.

Real SuperLink, SuperExec and SuperNodes, started by the files of ``feddistill deploy init``. Each case prints
what was done and the outcome; exit status 1 where an outcome is not the one that is documented.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import yaml

sys.path.append(str(Path(__file__).parent))
from federation import Federation, environment

NAMES = ["client-0", "client-1", "client-2"]
CONFIG = Path(__file__).with_name("tiny.yaml")
RUN_SECONDS = 500
RETRY_POLICY = ("--connect-timeout", "240", "--reply-timeout", "240", "--attempts", "3")


class Failed(Exception):
    """The outcome is not the one that is documented."""


def wait_for(path: Path, what: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
    """Until ``what`` is so."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise Failed(f"{path} did not come to it in {seconds:.0f} s")
        time.sleep(0.2)


def events(run: Path) -> list[dict]:
    path = run / "federation.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def seen(run: Path, event: str, task: str, number: int) -> bool:
    return any((e["event"], e["task"], e["round"]) == (event, task, number) for e in events(run))


def decided(run: Path) -> dict:
    """Payloads, ledger, figures of a complete run."""
    result = json.loads((run / "result.json").read_text())
    payloads = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("rounds/*/payloads/*"))}
    return {
        "payloads": payloads,
        "ledger": (run / "ledger.json").read_text(),
        "student": result["metrics"]["student"],
    }


class Trial:
    """One federation, in which one thing after the other goes wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "tiny.yaml"
        settings = yaml.safe_load(CONFIG.read_text()) | {"aggregation": {"quorum": 2}}
        self.config.write_text(yaml.safe_dump(settings, sort_keys=False))
        self.federation = Federation(folder / "federation", NAMES)
        self.runs = 0
        self.reference: dict | None = None

    def fresh(self) -> Path:
        """A folder for a run; clients have forgotten the last one."""
        for name in NAMES:
            shutil.rmtree(self.federation.node(name) / "state", ignore_errors=True)
        self.runs += 1
        return self.folder / f"run-{self.runs}"

    def begin(self, run: Path, *more: str) -> None:
        self.federation.begin(self.config, "--out", run, *RETRY_POLICY, *more)

    def end(self, run: Path) -> None:
        """The run completes by itself."""
        process = self.federation.processes["train"]
        try:
            status = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed("the run did not end") from None
        self.federation.processes.pop("train")
        if status != 0:
            raise Failed(f"status {status}: {self.federation.log('train')[-300:]}")

    def resume(self, run: Path) -> None:
        done = self.federation.train("--resume", "--out", run, *RETRY_POLICY, timeout=RUN_SECONDS)
        if done.returncode != 0:
            raise Failed(f"resume: {(done.stdout + done.stderr)[-300:]}")

    def same(self, run: Path) -> str:
        found = decided(run)
        if self.reference is None:
            self.reference = found
        if found != self.reference:
            raise Failed("other numbers than without the fault")
        return "the same payloads, teachers and metrics as without it"

    # ---- Cases

    def nothing(self) -> str:
        run = self.fresh()
        self.begin(run)
        self.end(run)
        self.same(run)
        return "completes"

    def supernode_killed(self) -> str:
        """While it trains; started again after that."""
        run = self.fresh()
        self.begin(run)
        wait_for(run, lambda: seen(run, "asked", "train", 1))
        self.federation.stop("client-1", signal.SIGKILL)
        time.sleep(3)
        self.federation.start_node("client-1")
        self.end(run)
        return self.same(run)

    def supernode_gone(self) -> str:
        """For good; the other two are the quorum."""
        run = self.fresh()
        self.begin(run)
        wait_for(run, lambda: seen(run, "replied", "answer", 1))
        wait_for(
            run, lambda: sum(e["event"] == "replied" and e["task"] == "answer" for e in events(run)) == 3
        )
        self.federation.stop("client-2", signal.SIGKILL)
        self.end(run)
        result = json.loads((run / "result.json").read_text())
        self.federation.start_node("client-2")
        if result["missing"] != {"2": ["client-2"]}:
            raise Failed(f"missing: {result['missing']}")
        return "completes with the other two; the report names round 2 and client-2"

    def client_killed(self) -> str:
        """The process that works for one task."""
        run = self.fresh()
        self.begin(run)
        wait_for(run, lambda: seen(run, "asked", "train", 1))
        group = os.getpgid(self.federation.processes["client-0"].pid)
        command = ["pgrep", "-g", str(group), "-f", "flwr-clientapp"]

        def working() -> list[str]:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()

        wait_for(run, lambda: bool(working()))
        for pid in working():
            os.kill(int(pid), signal.SIGKILL)
        self.end(run)
        return self.same(run)

    def coordinator_killed(self) -> str:
        run = self.fresh()
        self.begin(run)
        wait_for(run, lambda: seen(run, "asked", "train", 2))
        group = os.getpgid(self.federation.processes["superexec"].pid)
        pids = subprocess.run(
            ["pgrep", "-g", str(group), "-f", "flwr-serverapp"], capture_output=True, text=True, check=False
        ).stdout.split()
        if not pids:
            raise Failed("found no coordinator to kill")
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        before = len(events(run))
        self.federation.processes["train"].wait(RUN_SECONDS)
        self.federation.processes.pop("train")
        self.resume(run)
        again = [e for e in events(run)[before:] if e["event"] == "asked" and e["round"] == 1]
        if any(e["task"] in ("train", "answer") for e in again):
            raise Failed("asked again for what it had")
        return f"resumed without repeating round 1: {self.same(run)}"

    def command_killed(self) -> str:
        run = self.fresh()
        self.begin(run)
        wait_for(run, lambda: seen(run, "replied", "train", 1))
        self.federation.stop("train", signal.SIGKILL)
        # The coordinator is another process and goes on; it holds the run until it is done.
        wait_for(run, lambda: (run / "result.json").exists())
        time.sleep(3)
        self.resume(run)
        return f"the coordinator continued, --resume shows the result: {self.same(run)}"

    def superlink_killed(self) -> str:
        """And started again, with its database."""
        run = self.fresh()
        self.begin(run)
        wait_for(run, lambda: seen(run, "asked", "train", 1))
        self.federation.stop("superlink", signal.SIGKILL)
        time.sleep(3)
        self.federation.start_link()
        process = self.federation.processes.pop("train")
        try:
            status = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed("the run did not end") from None
        if status != 0:
            self.resume(run)
            return f"stopped where it could be resumed: {self.same(run)}"
        return f"the run continued: {self.same(run)}"

    def disk_full(self) -> str:
        """A client's state is on a device without room."""
        run = self.fresh()
        state = self.federation.node("client-1") / "state"
        state.symlink_to("/dev/full")
        self.begin(run)
        self.end(run)
        state.unlink()
        result = json.loads((run / "result.json").read_text())
        if result["missing"] != {"1": ["client-1"], "2": ["client-1"]}:
            raise Failed(f"missing: {result['missing']}")
        return "completes with the other two; nothing half-written was used"

    def too_few(self) -> str:
        """Two of three gone: fewer than the quorum."""
        run = self.fresh()
        for name in ("client-1", "client-2"):
            self.federation.stop(name, signal.SIGKILL)
        self.begin(run, "--connect-timeout", "20", "--attempts", "1")
        status = self.federation.processes.pop("train").wait(RUN_SECONDS)
        for name in ("client-1", "client-2"):
            self.federation.start_node(name)
        if status != 2 or "quorum 2" not in self.federation.log("train"):
            raise Failed(f"status {status}")
        self.resume(run)
        return f"stopped with an error; resumed: {self.same(run)}"


CASES = (
    "nothing",
    "client_killed",
    "supernode_killed",
    "coordinator_killed",
    "command_killed",
    "superlink_killed",
    "disk_full",
    "too_few",
    "supernode_gone",
)


def write(out: Path, found: list[dict]) -> None:
    """The table, in the order of the cases; those that were not tried now stay as they were."""
    rows = json.loads(out.read_text()) if out.exists() else []
    rows = {row["case"]: row for row in [*rows, *found]}
    out.write_text(json.dumps([rows[case] for case in CASES if case in rows], indent=1) + "\n")


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(CASES), help="Only these.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the table here, as JSON.")
def main(cases: tuple[str, ...], out: Path | None) -> None:
    """Print what was done to a federation, and what came of it."""
    assert environment()
    found = []
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name))
        with trial.federation:
            for case in ("nothing", *(c for c in cases or CASES if c != "nothing")):
                start = time.monotonic()
                try:
                    outcome, well = getattr(trial, case)(), True
                except Failed as error:
                    outcome, well = str(error), False
                    if "train" in trial.federation.processes:
                        trial.federation.stop("train")
                seconds = round(time.monotonic() - start)
                found.append({"case": case, "outcome": outcome, "as_documented": well, "seconds": seconds})
                if out:
                    write(out, found)
                click.echo(
                    f"{'ok  ' if well else 'FAIL'} {case.replace('_', ' '):20} {outcome} ({seconds} s)"
                )
    raise SystemExit(not all(row["as_documented"] for row in found))


if __name__ == "__main__":
    main()
