"""Plots of a report, as SVG with text labels, readable without colour."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from feddistill.config.methods import FEDERATED, LOCAL_ONLY, METHODS
from feddistill.data import Skew
from feddistill.report.result import Result

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "feddistill",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
# Okabe and Ito's colours, distinguishable by the colour-blind; line and marker differ as well.
CLIENTS: dict[str, Any] = {"color": "#999999", "marker": ".", "linewidth": 1.0, "linestyle": "-"}


WRITTEN = 40
"""Maximum number of labels or clients for which the cells of the skew plot are annotated."""


def draw(result: Result, skew: Skew) -> dict[str, str]:
    """Draw the plots of a run; name to SVG."""
    with matplotlib.rc_context(rc=STYLE):  # type: ignore[arg-type]  # its keys are a literal of 300 names
        return {
            "accuracy": _accuracy(result),
            "skew": _skew(skew),
            "traffic": _traffic(result),
            "seconds": _bars({k: v for k, v in result.seconds.items() if k in result.flops}, "seconds"),
            "flops": _bars({k: v / 1e12 for k, v in result.flops.items()}, "TFLOP"),
        }


@contextmanager
def figure(width: float, height: float, into: list[str], pixels: list[bytes] | None = None) -> Iterator[Axes]:
    """Context manager: yields axes; appends the plot to ``into`` (SVG) and ``pixels`` (PNG)."""
    # Padding in inches: a browser's font may be wider than the one used for the layout.
    drawing = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.15))
    yield drawing.add_subplot()
    if pixels is not None:
        image = io.BytesIO()
        drawing.savefig(image, format="png", dpi=150, metadata={"Software": None})
        pixels.append(image.getvalue())
    out = io.StringIO()
    drawing.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    # Embedded in a page: without XML prologue and metadata.
    into.append(re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL))


def _series(result: Result) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for point in result.points:
        series.setdefault(point.series, []).append((point.round, point.test))
    return series


def _accuracy(result: Result) -> str:
    svg: list[str] = []
    with figure(8, 4.2, svg) as axes:
        first = True
        for name, points in _series(result).items():
            if name.startswith("client "):
                axes.plot(*zip(*points, strict=True), **CLIENTS, label="clients" if first else None)
                first = False
            elif name in METHODS and (style := METHODS[name].style) is not None:
                axes.plot(*zip(*points, strict=True), **style, label=name.replace("_", " "))
        axes.plot(
            *zip(*((point.round, point.test) for point in result.curve("student")), strict=True),
            **(METHODS[FEDERATED].style or {}),
            label="student",
        )
        local = result.metrics.get(LOCAL_ONLY)
        if local:
            axes.axhline(
                local.get("best")[result.judged_by.decides],
                color="black",
                linestyle=":",
                linewidth=1,
                label="best client alone",
            )
        axes.set_xlabel("round")
        axes.set_ylabel(f"{result.judged_by.words} on the test set")
        axes.set_xticks(range(1, result.rounds + 1) if result.rounds <= 20 else axes.get_xticks())
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return svg[0]


def _skew(skew: Skew) -> str:
    svg: list[str] = []
    clients = len(skew.clients)
    with figure(8, 1.6 + 0.36 * min(clients, WRITTEN), svg) as axes:
        _counts(axes, skew)
    return svg[0]


def _counts(axes: Axes, skew: Skew) -> None:
    clients = len(skew.clients)
    axes.grid(visible=False)
    if not skew.labels:  # texts without labels or topics
        axes.text(0.5, 0.5, "texts without labels or topics", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    written = max(clients, len(skew.labels)) <= WRITTEN
    image = axes.imshow(skew.counts, cmap="Blues", aspect="auto", vmin=0)
    if written:
        peak = max(max(row) for row in skew.counts)
        for row, counts in enumerate(skew.counts):
            for column, count in enumerate(counts):
                colour = "white" if count > 0.6 * peak else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    else:
        axes.figure.colorbar(image, label="private examples")
    if len(skew.labels) <= WRITTEN:
        axes.set_xticks(range(len(skew.labels)), skew.labels, rotation=30, ha="right")
    else:
        axes.set_xlabel(f"label, by its number from 0: {skew.labels[0]} to {skew.labels[-1]}")
    if clients <= WRITTEN:
        names = [f"{c} ({sum(n)})" for c, n in zip(skew.clients, skew.counts, strict=True)]
        axes.set_yticks(range(clients), names)
    else:
        axes.set_ylabel("client, by its number from 0")
    axes.set_title("private examples by client and label", fontsize=10)


def _traffic(result: Result) -> str:
    sent = result.bytes
    sizes = {
        "answers up": sent.uplink,
        "requests, teachers down": sent.downlink,
        "proxy set, once": sent.proxy,
        "FedAvg up, same rounds": sent.fedavg_uplink_same_rounds,
    }
    svg: list[str] = []
    with figure(8, 2.2, svg) as axes:
        axes.barh(list(sizes), [max(v, 1) / 1e6 for v in sizes.values()], color="#56B4E9", edgecolor="black")
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.set_xlabel("MB, all clients and rounds (logarithmic)")
    return svg[0]


def _bars(values: dict[str, float], unit: str) -> str:
    svg: list[str] = []
    with figure(8, 0.9 + 0.32 * len(values), svg) as axes:
        names = [name.replace("_", " ") for name in values]
        bars = axes.barh(names, list(values.values()), color="#E69F00", edgecolor="black")
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
    return svg[0]
