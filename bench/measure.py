"""One case: agreement first, then memory, then time."""

from typing import Any

import torch

from bench.cases import Case, Setup
from bench.timing import Clock, Contender, check_agreement, in_turns, peak_extra_bytes

# Relative error of what is computed in float32 and rounded to a dtype.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}


def measure(case: Case, setup: Setup, tick: Clock, copy: tuple[Contender, int], box: float) -> dict[str, Any]:
    """The case's entry in a result file.

    Raises:
        DisagreementError: A contender does not compute what ours does.
    """
    contenders = case.contenders(setup)
    check(case.name, case.dtype, contenders)
    peaks = {contender.name: peak_extra_bytes(contender, setup.device) for contender in contenders}
    copying, copied = copy
    timings = in_turns([*contenders, copying], tick, box)
    speed = copied / timings.pop("copy").median
    floor = case.counted_bytes / speed if case.floor == "copy" else timings[case.floor].median
    implementations = {
        contender.name: {
            "median_ms": _ms(timings[contender.name].median),
            "quartiles_ms": [_ms(quartile) for quartile in timings[contender.name].quartiles],
            "min_ms": _ms(timings[contender.name].least),
            "runs": timings[contender.name].runs,
            "peak_extra_bytes": peaks[contender.name],
            **({"note": contender.note} if contender.note else {}),
        }
        for contender in contenders
    }
    return {
        "op": case.op,
        "variant": case.variant,
        "dtype": case.dtype,
        "shape": case.shape,
        "name": case.name,
        "headline": case.headline,
        "counted_bytes": case.counted_bytes,
        "copy_gb_per_s": round(speed / 1e9, 3),
        "floor": case.floor,
        "limit_ms": _ms(floor),
        "implementations": implementations,
    }


def check(name: str, dtype: str, contenders: list[Contender]) -> None:
    """Require every contender's value to be ours, or the one that it says."""
    ours, *others = contenders
    wanted = [x.clone() for x in ours.value(ours.run(*ours.prepare()))]
    for other in others:
        expected = other.expected() if other.expected else wanted
        given = other.value(other.run(*other.prepare()))
        tolerance = TOLERANCE[dtype] if other.tolerance is None else other.tolerance
        with torch.no_grad():
            check_agreement(f"{name}: {other.name}", given, expected, tolerance)


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")
