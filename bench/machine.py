"""Describe the machine and software of a measurement."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch

import feddistill_kernels as fk

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "cut-cross-entropy", "byzfl", "distillkit")


def describe(device: str) -> dict[str, object]:
    """Machine, versions, build, commit and time, as stored in a result file."""
    commit, dirty = _commit()
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "build": fk.build_info(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def publish(found: dict[str, Any], out: Path | None) -> None:
    """Print the measurements and, with ``out``, write them to a file."""
    text = json.dumps(found, indent=1) + "\n"
    click.echo(text)
    if out:
        out.write_text(text, encoding="utf-8")


def _cpu() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """Version of an installed package; ``unknown`` for one that is only on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown" if find_spec(package.replace("-", "_")) else None


def _commit() -> tuple[str | None, bool | None]:
    """The commit, and whether tracked files were changed; ``None`` if this file does not run from a clone.

    An installed package may lie inside another repository, whose commit says nothing about it.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT.resolve():
        return None, None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _first_line(path: str) -> str | None:
    return next(iter(_lines(path)), None)
