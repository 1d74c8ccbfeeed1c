"""Required speeds of the kernels, compared with a result file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .names import BACKENDS
from .rivals import medians, rivals, written_by_hand

LONG = 1 << 22
NOISE = 1.05  # a kernel that calls eager's own operation is at times a few per cent slower


@dataclass(frozen=True)
class Bar:
    """One requirement and its measurement."""

    what: str
    measured: str
    passes: bool


_R = "bfloat16 N=8192 V=128256"
_LINEAR = "bfloat16 N=8192 H=4096 V=128256"
_EIGHT = "bfloat16 C=8"

# Most milliseconds on an H100: of "ours", the default backend, and of backends that have their own limit.
GPU: dict[str, dict[str, float]] = {
    f"distillation_loss forward_kl {_R}": {"ours": 2.1, "native": 2.1, "triton": 3.6},
    f"distillation_loss jsd {_R}": {"ours": 5.0, "triton": 5.0},
    f"distillation_loss forward_kl of TopK {_R} K=64": {"ours": 1.4},
    f"topk_compress {_R} K=64": {"ours": 0.75},
    f"topk_compress {_R} K=128": {"ours": 0.75},
    f"coordinate_median {_EIGHT} n={8192 * 128256}": {"ours": 6.5},
    f"trimmed_mean {_EIGHT} n={8192 * 128256}": {"ours": 6.5},
    f"krum {_EIGHT} N=8192 V=128256": {"ours": 12.0},
    f"geometric_median {_EIGHT} N=8192 V=128256": {"ours": 6.5},
    f"linear_distillation_loss of logits {_LINEAR}": {"ours": 38.0},
    f"linear_distillation_loss of TopK {_LINEAR}": {"ours": 38.0},
    f"linear_distillation_loss of teacher head {_LINEAR}": {"ours": 52.0},
}


def bars(results: dict[str, Any]) -> Iterator[Bar]:
    """Evaluate every requirement, those of single kernels first.  A case that was not measured fails."""
    cases = {case["name"]: case for case in results["cases"]}
    if results["device"] == "cuda":
        yield from _gpu_bars(cases)
        return
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


def described(held: Iterable[Bar]) -> Iterator[str]:
    """One line per requirement, then the number of missed ones."""
    missed = 0
    for bar in held:
        missed += not bar.passes
        yield f"{'pass' if bar.passes else 'FAIL'}  {bar.what}: {bar.measured}"
    yield f"{missed} missed"


def _gpu_bars(cases: dict[str, Any]) -> Iterator[Bar]:
    for name, limits in GPU.items():
        case = cases.get(name, {"implementations": {}})
        found, others = medians(case), rivals(case)
        for contender, limit in limits.items():
            if contender != "ours" and contender not in case["implementations"]:
                continue  # this operator has no such backend
            what = f"{name}: {contender} in at most {limit:g} ms on an H100"
            if contender not in found:
                why = case["implementations"].get(contender, {}).get("failed")
                yield Bar(what, f"not measured{f': {why}' if why else ''}", False)
                continue
            ms = found[contender]
            ratios = [f"{other} takes {median / ms:.3g}x" for other, median in others.items()]
            if contender == "ours":
                ratios = [f"{other} {found[other]:.3g} ms" for other in BACKENDS if other in found] + ratios
            yield Bar(what, ", ".join([f"{ms:.3g} ms", *ratios]), ms <= limit)
    for name, case in cases.items():
        if "ours" in medians(case):
            yield from _never_slower(name, case)
        elif name not in GPU:
            yield Bar(f"{name}: runs", case["implementations"]["ours"]["failed"], False)


def _bars(
    cases: dict[str, Any], name: str, against: tuple[str, ...], times: float, limit: float | None
) -> Iterator[Bar]:
    """``times`` faster than the fastest of ``against``; at most ``limit`` times the case's limit."""
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
    found = medians(case)
    names = [*written_by_hand(case), *(["compile"] if "compile" in found else [])]
    others = {name: found[name] for name in names}
    if others:
        quickest = min(others, key=others.__getitem__)
        ratio = found["ours"] / others[quickest]
        yield Bar(f"{what}: never slower than {quickest}", f"{ratio:.3g} of its time", ratio <= NOISE)
