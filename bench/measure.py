"""Measure one case: agreement first, then memory, then time."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels import available_backends, use_backend

from .cases import Case, Setup
from .names import FAMILY
from .timing import Clock, Contender, check_agreement, in_turns, peak_extra_bytes

# Allowed relative error of a result that is computed in float32 and rounded to a dtype.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}


def measure(
    case: Case, setup: Setup, tick: Clock, copy: tuple[Contender, int], box: float, go_on: bool = False
) -> dict[str, Any]:
    """Measure a case and return its entry of a result file.

    Raises:
        DisagreementError: A contender's result differs from ours, and ``go_on`` is not set.
    """
    try:
        ours, *others = case.contenders(setup)
    except (
        Exception
    ) as error:  # its inputs are more than there is memory for, or a kernel that makes them fails
        if not go_on:
            raise
        ours, others = Contender("ours", partial(_fail, _message(error))), []
    contenders = [ours, *by_backend(case.op, ours, setup.device), *others]
    failures: dict[str, str] | None = {} if go_on else None
    peaks = check(case.name, case.dtype, setup.device, contenders, failures)
    able = [contender for contender in contenders if contender.name in peaks]
    copying, copied = copy
    timings = in_turns([*able, copying], tick, box)
    speed = copied / timings.pop("copy").median
    floor = timings[case.floor].median if case.floor in timings else case.counted_bytes / speed
    implementations: dict[str, Any] = {}
    for contender in contenders:
        if failures and contender.name in failures:
            implementations[contender.name] = {"failed": failures[contender.name]}
            continue
        timing = timings[contender.name]
        implementations[contender.name] = {
            "median_ms": _ms(timing.median),
            "quartiles_ms": [_ms(quartile) for quartile in timing.quartiles],
            "min_ms": _ms(timing.least),
            "runs": timing.runs,
            "peak_extra_bytes": peaks[contender.name],
            **({"note": contender.note} if contender.note else {}),
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
        "floor": case.floor if case.floor in timings else "copy",
        "limit_ms": _ms(floor),
        "implementations": implementations,
    }


def by_backend(op: str, ours: Contender, device: str) -> list[Contender]:
    """Ours on each GPU backend by name, but for the reference, which is not written for speed."""
    if device != "cuda":
        return []
    return [
        replace(ours, name=name, run=_on(name, ours.run))
        for name in available_backends(FAMILY[op], device)
        if name != "reference"
    ]


def _on(backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def named(*arguments: Any) -> Any:
        with use_backend(backend):
            return run(*arguments)

    return named


def check(
    name: str,
    dtype: str,
    device: str,
    contenders: list[Contender],
    failures: dict[str, str] | None = None,
) -> dict[str, int | None]:
    """Require that every contender's value equals ours, or its own ``expected``; return their extra bytes.

    With ``failures``, one that fails is recorded there and left out, and the values are compared with the
    first that does not fail.
    """
    wanted: list[Tensor] | None = None
    peaks: dict[str, int | None] = {}
    for contender in contenders:
        try:
            contender.run(*contender.prepare())  # a first call may compile or allocate what later calls reuse
            result, extra = peak_extra_bytes(contender, device)
            with torch.no_grad():
                if wanted is None and contender.expected is None:
                    wanted = [x.clone() for x in contender.value(result)]
                else:
                    tolerance = TOLERANCE[dtype] if contender.tolerance is None else contender.tolerance
                    expected = contender.expected() if contender.expected else wanted
                    assert expected is not None
                    check_agreement(f"{name}: {contender.name}", contender.value(result), expected, tolerance)
        except Exception as error:  # a contender that fails does not stop the others
            if failures is None:
                raise
            failures[contender.name] = _message(error)
            continue
        finally:
            result = expected = None
        peaks[contender.name] = extra
    return peaks


def _fail(why: str) -> None:
    raise RuntimeError(why)


def _message(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")
