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
    peaks = check(case.name, case.dtype, setup.device, contenders)
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


def check(name: str, dtype: str, device: str, contenders: list[Contender]) -> dict[str, int | None]:
    """Require every contender's value to be ours, or the one that it says; the extra bytes of each."""
    ours, *others = contenders
    for contender in contenders:
        contender.run(*contender.prepare())  # what a first call makes, or compiles, stays out of the bytes
    result, extra = peak_extra_bytes(ours, device)
    wanted, peaks = [x.clone() for x in ours.value(result)], {ours.name: extra}
    del result
    for other in others:
        result, peaks[other.name] = peak_extra_bytes(other, device)
        tolerance = TOLERANCE[dtype] if other.tolerance is None else other.tolerance
        with torch.no_grad():
            expected = other.expected() if other.expected else wanted
            check_agreement(f"{name}: {other.name}", other.value(result), expected, tolerance)
        del result
    return peaks


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")
