"""A run: cases in turn, a table on the way, one result in the end."""

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
"""Seconds of a case; a GPU is steadier, and lent."""


def run(
    cases: Iterable[Case],
    setup: Setup,
    *,
    quick: bool,
    echo: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
    go_on: bool = False,
) -> dict[str, Any]:
    """Measure ``cases`` and return what a result file holds.

    Args:
        cases: What to measure.
        setup: Where, and who competes.
        quick: Briefly.
        echo: Prints a line.
        keep: Takes what is there after each case.
        go_on: A contender that fails says so in its entry, instead of ending the run.

    Raises:
        DisagreementError: A contender does not compute what ours does, and ``go_on`` is not set.
    """
    start, on = time.perf_counter(), machine.describe(setup.device)  # files may change while it runs
    # Four times what the largest last-level caches hold; some memory systems are slower before they are warm.
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
