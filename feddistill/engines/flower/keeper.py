"""Processes that are started for a command and must not outlive it.

``python keeper.py keep FOLDER COMMAND...`` runs it for as long as somebody holds our standard input. The
system closes that however the holder ends, by SIGKILL too. Then all that the command has started is ended, in
sessions of its own as well, and the folder removed, where its notes are.
``python keeper.py follow COMMAND...`` becomes a command that has no children, and is ended with its parent.
Nothing but the standard library is imported: it waits beside every simulation.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PARENT_DEATH = 1
"""Linux's PR_SET_PDEATHSIG."""
LOOK_SECONDS = 0.5
END_SECONDS = 10.0
"""Grace period before SIGKILL, seconds."""
ADOPT = 36
"""Linux's PR_SET_CHILD_SUBREAPER: orphaned descendants become our children, so that all are known."""


def keep(folder: Path, command: list[str]) -> None:
    """Start the command, wait until it or the holder ends, end the rest."""
    ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        while process.poll() is None and not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
            pass
    finally:
        end()
        if select.select([sys.stdin], [], [], 0)[0]:  # otherwise the holder still reads the reason
            shutil.rmtree(folder, ignore_errors=True)


def follow(command: list[str]) -> None:
    """Replace this process by the command."""
    ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    os.execvp(command[0], command)


def end() -> None:
    """End all descendants of this process: SIGTERM first, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        told: set[int] = set()
        late = time.monotonic() + END_SECONDS
        while (rest := below(os.getpid())) and time.monotonic() < late:
            for pid in rest - told:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            told |= rest
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.05)


def below(pid: int) -> set[int]:
    """All descendants of this process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    more = {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep(Path(sys.argv[2]), sys.argv[3:])
    else:
        follow(sys.argv[2:])
