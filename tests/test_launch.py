"""What is refused before a federation is bothered, and what is left when its command is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from feddistill.engines.flower import keeper
from feddistill.engines.flower.launch import Link, _reach
from feddistill.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1", "--superlink 127.0.0.1 is not HOST:PORT"),
        ("localhost:99999", "is not HOST:PORT"),
        ("link.example.org:9092", "is on a network and needs --root-certificates"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(address, message):
    with pytest.raises(ConfigError, match=message):
        _reach(Link(address))


def test_an_address_where_nothing_answers_is_refused_and_any_other_is_not():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--superlink {address}: nothing answers there"):
            _reach(Link(address))
        server.listen()
        _reach(Link(address))


FAMILY = """
import subprocess, sys, time
from pathlib import Path

sleep = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"]
orphan = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=-3, process_group=0).pid)"
made = subprocess.run([sys.executable, "-c", orphan, *sleep], stdout=-1, text=True, check=True)
child = subprocess.Popen(sleep, start_new_session=True)
partial = Path(sys.argv[1], "partial")
partial.write_text(f"{made.stdout} {child.pid}")
partial.rename(Path(sys.argv[1], "pids"))
if sys.argv[2] == "stay":
    time.sleep(99)
"""
"""A process that starts others, an orphan among them, which do not end when they are asked to."""


def kept(folder, notes, then):
    """The keeper's command, with less patience."""
    keep = f"keeper.keep(Path({str(folder)!r}), [sys.executable, '-c', {FAMILY!r}, {str(notes)!r}, {then!r}])"
    code = "import sys; from pathlib import Path; from feddistill.engines.flower import keeper"
    return [sys.executable, "-c", f"{code}; keeper.END_SECONDS = 0.3; {keep}"]


def gone(pids):
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, 0)
            return False
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_command_has_started_ends_with_it(how, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    command = kept(folder, tmp_path, "stay")
    holder = f"import subprocess, time; subprocess.Popen({command}, stdin=-1); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", holder]) as process:
        pids = wait_for_family(tmp_path)
        assert not gone(pids[:1])
        assert not gone(pids[1:])
        process.send_signal(how)
    wait_until(lambda: gone(pids) and not folder.exists())


def test_what_a_command_leaves_behind_ends_after_it(tmp_path):
    with subprocess.Popen(kept(tmp_path, tmp_path, "go"), stdin=subprocess.PIPE) as process:
        pids = wait_for_family(tmp_path)
        wait_until(lambda: process.poll() is not None)
        assert gone(pids)
    assert tmp_path.exists()  # its log is still to be read


def test_flowers_own_command_ends_with_ours(tmp_path):
    note = f"import os, time; os.symlink(str(os.getpid()), {str(tmp_path / 'pid')!r}); time.sleep(99)"
    sleep = [sys.executable, "-c", note]
    followed = [sys.executable, "-I", keeper.__file__, "follow", *sleep]
    with subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({followed})"]
    ) as process:
        wait_until((tmp_path / "pid").is_symlink)
        process.kill()
    wait_until(lambda: gone([int((tmp_path / "pid").readlink().name)]))


def wait_for_family(folder):
    wait_until((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def wait_until(what, seconds=30):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)
