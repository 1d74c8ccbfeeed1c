"""Measure cases one after the other, print a table line by line, return the result."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import machine, tables
from .cases import Case, Setup
from .measure import measure
from .record import SCHEMA
from .timing import clock, copying

BOX = {"cpu": 2.0, "cuda": 0.4}
"""Seconds per case; timings on a GPU vary less."""


def run(
    cases: Iterable[Case],
    setup: Setup,
    *,
    quick: bool,
    echo: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
    go_on: bool = False,
) -> dict[str, Any]:
    """Measure ``cases`` and return the content of a result file.

    Args:
        cases: Cases to measure.
        setup: The device and the competitors.
        quick: Spend 0.2 seconds per case.
        echo: Prints a line.
        keep: Called after each case with the results so far.
        go_on: Record the failure of a contender in its entry instead of ending the run.

    Raises:
        DisagreementError: A contender's result differs from ours, and ``go_on`` is not set.
    """
    start, on = (
        time.perf_counter(),
        machine.describe(setup.device),
    )  # before the run: files may change while it runs
    # Four times the largest last-level caches; some memory systems are slower before they are warm.
    tick, copy = clock(setup.device), copying(setup.device, megabytes=128 if quick else 512)
    echo(tables.HEAD)
    measured: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for case in cases:
        measured.append(measure(case, setup, tick, copy, 0.2 if quick else BOX[setup.device], go_on))
        echo(tables.lines(measured[-1]))
        torch._dynamo.reset()
        gc.collect()
        if setup.device == "cuda":
            torch.cuda.empty_cache()
        results = {
            "schema": SCHEMA,
            "device": setup.device,
            "quick": quick,
            **on,
            "seconds": round(time.perf_counter() - start, 1),
            "copy_gb_per_s": round(statistics.median(case["copy_gb_per_s"] for case in measured), 3),
            "skipped": setup.skipped,
            "cases": measured,
        }
        keep(results)
    for name, reason in setup.skipped.items():
        echo(f"{name}: {reason}")
    return results
