"""A run: cases in turn, a table on the way, one result in the end."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench import machine, tables
from bench.cases import Case, Setup
from bench.measure import measure
from bench.timing import clock, copying

SCHEMA = 1


def run(cases: Iterable[Case], setup: Setup, *, quick: bool, echo: Callable[[str], None]) -> dict[str, Any]:
    """Measure ``cases`` and return what a result file holds.

    Raises:
        DisagreementError: A contender does not compute what ours does.
    """
    start, on = time.perf_counter(), machine.describe(setup.device)  # files may change while it runs
    # Four times what the largest last-level caches hold; some memory systems are slower before they are warm.
    tick, copy = clock(setup.device), copying(setup.device, megabytes=128 if quick else 512)
    echo(tables.HEAD)
    measured = []
    for case in cases:
        measured.append(measure(case, setup, tick, copy, box=0.2 if quick else 2.0))
        echo(tables.lines(measured[-1]))
        torch._dynamo.reset()
        gc.collect()
    for name, reason in setup.skipped.items():
        echo(f"{name}: {reason}")
    return {
        "schema": SCHEMA,
        "device": setup.device,
        "quick": quick,
        **on,
        "seconds": round(time.perf_counter() - start, 1),
        "copy_gb_per_s": round(statistics.median(case["copy_gb_per_s"] for case in measured), 3),
        "skipped": setup.skipped,
        "cases": measured,
    }
