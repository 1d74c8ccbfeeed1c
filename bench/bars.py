"""What the kernels must reach on a CPU, held against a result file."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.rivals import written_by_hand

LONG = 1 << 22
NOISE = 1.05  # a kernel that hands over to eager's own operation is at times a few per cent slower


@dataclass(frozen=True)
class Bar:
    """One requirement and what was measured."""

    what: str
    measured: str
    passes: bool


def bars(results: dict[str, Any]) -> Iterator[Bar]:
    """Every bar, those first that were written for one kernel.  What was not measured fails."""
    cases = {case["name"]: case for case in results["cases"]}
    for dtype in ("float32", "bfloat16"):
        for shape in ("N=1024 V=32000", "N=256 V=128256"):
            faster = ("eager", "eager float32", "compile")
            yield from _bars(cases, f"distillation_loss forward_kl {dtype} {shape}", faster, 5, 2.5)
            yield from _bars(cases, f"topk_compress {dtype} {shape} K=64", faster, 6, 3)
            written = ("eager" if dtype == "float32" else "eager float32",)
            yield from _bars(
                cases, f"distillation_loss forward_kl of TopK {dtype} {shape} K=64", written, 8, None
            )
        for count, limit in ((5, 2), (8, 2), (16, 4)):
            shape = f"C={count} n={LONG}"
            yield from _bars(cases, f"coordinate_median {dtype} {shape}", ("torch.median",), 40, limit)
            if count > 5:
                yield from _bars(cases, f"trimmed_mean {dtype} {shape}", ("sort",), 40, limit)
    for name, case in cases.items():
        yield from _never_slower(name, case)


def _bars(
    cases: dict[str, Any], name: str, against: tuple[str, ...], times: float, limit: float | None
) -> Iterator[Bar]:
    """At least so many times faster than the fastest of ``against``; at most so many times the limit."""
    found = cases[name]["implementations"] if name in cases else {}
    wanted = [
        contender for contender in against if not (contender.endswith("float32") and " float32 " in name)
    ]
    absent = [contender for contender in ("ours", *wanted) if contender not in found]
    what = f"{name}: {times}x faster than {' or '.join(wanted)}"
    if absent:
        yield Bar(what, f"not measured: {', '.join(absent)}", False)
    else:
        ratio = min(found[contender]["median_ms"] for contender in wanted) / found["ours"]["median_ms"]
        yield Bar(what, f"{ratio:.3g}x", ratio >= times)
    if limit is None:
        return
    what = f"{name}: at most {limit}x its limit"
    if "ours" not in found:
        yield Bar(what, "not measured", False)
    else:
        ratio = found["ours"]["median_ms"] / cases[name]["limit_ms"]
        yield Bar(what, f"{ratio:.3g}x", ratio <= limit)


def _never_slower(what: str, case: dict[str, Any]) -> Iterator[Bar]:
    found = case["implementations"]
    names = [*written_by_hand(case), *(["compile"] if "compile" in found else [])]
    others = {name: found[name]["median_ms"] for name in names}
    if others:
        quickest = min(others, key=others.__getitem__)
        ratio = found["ours"]["median_ms"] / others[quickest]
        yield Bar(f"{what}: never slower than {quickest}", f"{ratio:.3g} of its time", ratio <= NOISE)
