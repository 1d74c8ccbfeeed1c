"""Two plots of a result file: time relative to ours, and bandwidth against the copy's."""

from pathlib import Path
from typing import Any

from .rivals import medians, rivals

WIDTH = 7.6  # inches: a README's column at 100 dots an inch
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222"]
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
STYLE: Any = {
    "svg.hashsalt": "feddistill",  # the same file for the same results
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Write ``-time.svg`` and ``-bandwidth.svg`` beside a result file; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    with matplotlib.rc_context(STYLE):
        for name, make in (("time", times), ("bandwidth", bandwidths)):
            target = path.with_name(f"{path.stem}-{name}.svg")
            make(results).savefig(target, metadata={"Date": None}, bbox_inches="tight")
            written.append(target)
    return written


def times(results: dict[str, Any]) -> Any:
    """Bar chart of the competitors' times as multiples of ours: headline cases, log scale."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    measured = [case for case in results["cases"] if "ours" in medians(case)]
    cases = [case for case in measured if case["headline"]] or measured
    names = list(dict.fromkeys(name for case in cases for name in rivals(case)))
    height = 0.9 + 0.18 * sum(len(rivals(case)) + 0.9 for case in cases)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    ticks, labels, y, least, most = [], [], 0.0, 0.9, 1.1
    for case in cases:
        ours, others = case["implementations"]["ours"]["median_ms"], rivals(case)
        ticks.append(y + (len(others) - 1) / 2)
        labels.append(_label(case))
        for name, median in others.items():
            ratio = median / ours
            least, most = min(least, ratio), max(most, ratio)
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axes.barh(y, ratio - 1, left=1, height=0.85, color=colour)
            text = f"{ratio:.3g}×" if ratio < 1000 else f"{ratio:.0f}×"
            side, offset = ("left", 3) if ratio >= 1 else ("right", -3)
            axes.annotate(
                text,
                (ratio, y),
                xytext=(offset, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=7,
            )
            y += 1
        y += 0.9
    axes.set_xscale("log")
    room = (most / least) ** 0.13  # for the numbers at the ends of the bars
    axes.set_xlim(least / (room if least < 0.9 else 1), most * room)
    axes.set_ylim(y - 0.9, -1)
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.set_xlabel(f"time relative to feddistill_kernels (1×), log scale: {_machine(results)}")
    handles = [_patch(COLOURS[index % len(COLOURS)], name) for index, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(names)), frameon=False)
    return figure


def bandwidths(results: dict[str, Any]) -> Any:
    """Scatter plot of bandwidth (counted bytes over time): ours, the fastest competitor's, the copy's."""
    from matplotlib.figure import Figure

    cases = [case for case in results["cases"] if case["floor"] == "copy" and "ours" in medians(case)]
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    ops = list(dict.fromkeys(case["op"] for case in cases))
    for index, op in enumerate(ops):
        colour, marker = COLOURS[index % len(COLOURS)], "osD^vP*Xph"[index % 10]
        for case in (case for case in cases if case["op"] == op):
            size = case["counted_bytes"]
            others = rivals(case)
            if others:
                axes.plot(
                    size, size / min(others.values()) / 1e6, marker, mfc="none", mec=colour, ms=5, alpha=0.7
                )
            axes.plot(
                size, size / case["implementations"]["ours"]["median_ms"] / 1e6, marker, color=colour, ms=6
            )
        axes.plot([], [], marker, color=colour, label=op)
    axes.plot([], [], "o", mfc="none", mec="#222222", label="hollow: the fastest other")
    copy = results["copy_gb_per_s"]
    axes.axhline(copy, color="#222222", linestyle="--", linewidth=1, label=f"copy, {copy:.3g} GB/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.set_xlabel(f"bytes that must move, a call: {_machine(results)}")
    axes.set_ylabel("GB/s of these bytes")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _label(case: dict[str, Any]) -> str:
    sizes = " ".join(f"{letter}={size}" for letter, size in case["shape"].items())
    if "n" in case["shape"]:
        sizes = sizes.replace(f"n={1 << 22}", "n=4Mi")
    return f"{case['op']} {case['variant']}".strip() + f"\n{SHORT[case['dtype']]} {sizes}"


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
