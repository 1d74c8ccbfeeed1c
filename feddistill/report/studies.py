"""The report of a study: mean and standard deviation over seeds, as plots and tables."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from feddistill.config.methods import FEDERATED, METHODS, row_labels
from feddistill.config.tasks import Task
from feddistill.errors import RunError
from feddistill.report import as_csv, metric_rows, rendered, size, task_of
from feddistill.report.plots import STYLE, figure
from feddistill.report.result import Result
from feddistill.runs.study import CELLS, STUDY, Cell, collect, groups
from feddistill.store import layout
from feddistill.store.records import Traffic
from feddistill.store.run_directory import Json

PAGE = "study.html"
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
MANY = 10
"""Maximum number of lines in a plot; a heat map is drawn above it."""


def write(out: Path) -> Path:
    """Write the report of a study into its folder: page, plots, CSV, LaTeX; returns the page.

    Raises:
        RunError: No run of the study is complete.
    """
    study, found = collect(out)
    task = _task(found)
    rows = [
        {
            **cell.labels,
            "seed": cell.seed,
            "who": who,
            **figures,
            **_costs(result, who),
            **_reached(result, who, study.target),
        }
        for cell, result in found
        for who, figures in metric_rows(result)
    ]
    (out / "runs.csv").write_text(as_csv(rows), encoding="utf-8")
    summary = [row for labels, results in groups(found) for row in _summary(labels, results, study.target)]
    (out / "summary.csv").write_text(as_csv(summary), encoding="utf-8")
    (out / "table.tex").write_text(latex(summary, task), encoding="utf-8")
    steady = robustness(summary, task)
    drawn = draw([(labels, results) for labels, results in groups(found)])
    for name, drawing in drawn.items():
        plot = out / layout.plot(name)
        plot.parent.mkdir(exist_ok=True)
        plot.write_text(drawing.svg, encoding="utf-8")
        plot.with_suffix(".png").write_bytes(drawing.png)
    path = out / PAGE
    total = len(study.seeds) * len(list(groups(found)))
    path.write_text(
        rendered(
            "study.html",
            study=study,
            task=task,
            summary=summary,
            robustness=steady,
            names=row_labels(),
            figures={name: drawing.svg for name, drawing in drawn.items()},
            done=len(found),
            total=total,
            cells=[(cell.name, f"{CELLS}/{cell.name}") for cell, _ in found],
            environment=Result.from_json(found[0][1]).environment,
            source=(out / STUDY).read_text(encoding="utf-8"),
            size=size,
        ),
        encoding="utf-8",
    )
    return path


def _task(found: Sequence[tuple[Cell, Json]]) -> Task:
    """The task of all runs; raises if they differ."""
    tasks = {task_of(result).decides: task_of(result) for _, result in found}
    if len(tasks) > 1:
        raise RunError(
            f"a study must have one task; the metrics of its runs are {' and '.join(sorted(tasks))}"
        )
    return next(iter(tasks.values()))


def _costs(result: Json, who: str) -> Json:
    """Uploaded bytes and floating-point operations of a row."""
    typed = Result.from_json(result)
    if who == "student":
        ours = sum(f for name, f in typed.flops.items() if not name.startswith("baseline_"))
        return {"uplink": typed.bytes.uplink, "flops": ours - typed.flops.get("evaluate", 0)}
    name = who.removesuffix("_mean").removesuffix("_best")
    traffic, phase = typed.bytes.baselines.get(name), f"baseline_{name}"
    own, shared = typed.flops.get(phase), typed.flops_shared.get(phase, 0)
    return {
        "uplink": None if traffic is None else traffic.uplink,
        "flops": None if own is None else own + shared,
    }


def _reached(result: Json, who: str, target: float | None) -> Json:
    """The first round in which a method reached ``target`` on validation, and its uploaded bytes."""
    if target is None:
        return {}
    typed = Result.from_json(result)
    curve = typed.curve(who)
    rounds = [point.round for point in curve if typed.judged_by.reaches(point.validation, target)]
    if not rounds:
        return {"target_round": None, "target_bytes": None}
    if who == "student":
        sent = sum(sum(entry.uplink.values()) for entry in typed.bytes.by_round[: rounds[0]])
        return {"target_round": rounds[0], "target_bytes": sent + typed.bytes.descriptions}
    whole = typed.bytes.baselines.get(who, Traffic()).uplink
    last = max(point.round for point in curve)
    return {"target_round": rounds[0], "target_bytes": whole * rounds[0] // last}


def _summary(labels: Mapping[str, Any], results: Sequence[Json], target: float | None = None) -> list[Json]:
    """A row for each method: mean and sample standard deviation over seeds.

    A target is reached if every seed reached it; rounds and bytes are means over the seeds.
    """
    rows = []
    for who, _ in metric_rows(results[0]):
        of = [dict(metric_rows(result))[who] for result in results]
        row: Json = {**labels, "who": who, "seeds": len(results)}
        for metric in task_of(results[0]).shown:
            values = [figures[metric] for figures in of]
            row[metric] = round(fmean(values), 6)
            row[f"{metric}_std"] = round(stdev(values), 6) if len(values) > 1 else None
        costs = [_costs(result, who) for result in results]
        for cost in ("uplink", "flops"):
            known = [c[cost] for c in costs if c[cost] is not None]
            row[cost] = round(fmean(known)) if known else None
        reached = [_reached(result, who, target) for result in results]
        for key in reached[0]:
            values = [one[key] for one in reached]
            row[key] = round(fmean(values), 1) if None not in values else None
        rows.append(row)
    return rows


def robustness(summary: Sequence[Json], task: Task) -> list[Json]:
    """Minimum, maximum and range of the primary metric over the first axis of the study.

    One row per method or, with several axes, one for the student per value of the other axes. Empty if the
    first axis has a single value.
    """
    axes = _labels(summary)
    if not axes:
        return []
    first, *rest = axes
    found: dict[str, list[Json]] = {}
    for row in summary:
        if not rest or row["who"] == "student":
            who = row_labels()[row["who"]] if not rest else ", ".join(_shown(row[key]) for key in rest)
            found.setdefault(who, []).append(row)
    rows = []
    for who, of in found.items():
        low, high = (pick(of, key=lambda row: row[task.decides]) for pick in (min, max))
        rows.append(
            {
                "who": who,
                "least": low[task.decides],
                "least_at": _shown(low[first]),
                "most": high[task.decides],
                "most_at": _shown(high[first]),
                "spread": round(high[task.decides] - low[task.decides], 6),
            }
        )
    return rows if len({_shown(row[first]) for row in summary}) > 1 else []


def latex(summary: Sequence[Json], task: Task) -> str:
    """LaTeX ``tabular`` of the primary metric, one row per cell and method."""
    digits = 1 if task.percent else 3
    labels = [key for key in summary[0] if key in _labels(summary)]
    head = " & ".join([*map(_tex, labels), "method", _tex(task.words), "uplink"])
    lines = [rf"\begin{{tabular}}{{{'l' * (len(labels) + 1)}rr}}", r"\toprule", head + r" \\", r"\midrule"]
    for row in summary:
        std = row[f"{task.decides}_std"]
        spread = "" if std is None else rf" $\pm$ {task.read({task.decides: std}):.{digits}f}"
        sent = "--" if row["uplink"] is None else size(row["uplink"])
        cells = [*(_tex(_shown(row[key])) for key in labels), _tex(row_labels()[row["who"]])]
        lines.append(" & ".join([*cells, f"{task.read(row):.{digits}f}{spread}", sent]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _labels(summary: Sequence[Json]) -> list[str]:
    return list(summary[0])[: list(summary[0]).index("who")]


_TEX = {
    **{char: f"\\{char}" for char in "&%_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A plot as SVG and PNG."""

    svg: str
    png: bytes


@contextmanager
def _figure(width: float, height: float, into: list[Drawing]) -> Iterator[Axes]:
    svg: list[str] = []
    png: list[bytes] = []
    with figure(width, height, svg, png) as plot:
        yield plot
    into.append(Drawing(svg[0], png[0]))


def draw(found: Sequence[tuple[Mapping[str, Any], list[Json]]]) -> dict[str, Drawing]:
    """Draw the primary metric by round, against costs and over the grid; name to plot."""
    with matplotlib.rc_context(rc=STYLE):  # type: ignore[arg-type]  # typed as a Literal
        drawn = {"rounds": _by_round(found), "bytes": _against(found, "uplink", "MB up, all rounds", 1e6)}
        drawn["flops"] = _against(found, "flops", "TFLOP", 1e12)
        axes = list(found[0][0])
        if axes and len(found) > 1:
            drawn["grid"] = _grid(found, axes)
    return drawn


def _mean(results: Sequence[Json], who: str) -> tuple[float, float]:
    values = [task_of(result).read(dict(metric_rows(result))[who]) for result in results]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)]}


def _grid(found: Sequence[tuple[Mapping[str, Any], list[Json]]], axes: list[str]) -> Drawing:
    """Plot the primary metric over the first axis; a line per method or per value of the other axes."""
    first, rest = axes[0], axes[1:]
    task = task_of(found[0][1][0])
    values = list(dict.fromkeys(_shown(labels[first]) for labels, _ in found))
    lines: dict[str, dict[str, tuple[float, float]]] = {}
    for labels, results in found:
        here = _shown(labels[first])
        if rest:
            name = ", ".join(_shown(labels[key]) for key in rest)
            lines.setdefault(name, {})[here] = _mean(results, "student")
        else:
            for who, _ in metric_rows(results[0]):
                lines.setdefault(row_labels()[who], {})[here] = _mean(results, who)
    into: list[Drawing] = []
    if not rest and not all(isinstance(labels[first], int | float) for labels, _ in found):
        return _bars(lines, values, task)
    tall = max(4.4, 1.2 + 0.34 * len(lines)) if len(lines) > MANY else 4.4
    with _figure(8, tall, into) as plot:
        if len(lines) > MANY:
            _heat(plot, lines, values, task)
            plot.set_title(f"{'student: ' if rest else ''}{task.axis}", fontsize=10)
        else:
            _lines(plot, lines, values)
            plot.set_ylabel(f"{task.axis}{' (student)' if rest else ''}")
        plot.set_xlabel(first)
    return into[0]


def _shown(value: Any) -> str:
    """Format a value of an axis for display: a group of settings without braces."""
    if isinstance(value, Mapping):
        kind = [str(value["kind"])] if "kind" in value else []
        return ", ".join([*kind, *(f"{key} {_shown(v)}" for key, v in value.items() if key != "kind")])
    return str(value)


def _bars(lines: Mapping[str, Mapping[str, tuple[float, float]]], values: list[str], task: Task) -> Drawing:
    """Plot a bar per value for the student, and a marker for each other method."""
    into: list[Drawing] = []
    with _figure(8, 1.4 + 0.42 * len(values), into) as plot:
        for index, (name, points) in enumerate(lines.items()):
            places = [values.index(value) for value in points]
            means, spreads = zip(*points.values(), strict=True)
            if name == METHODS[FEDERATED].label:
                ends = {"capsize": 3, "linewidth": 1.2}
                plot.barh(
                    places, means, xerr=spreads, height=0.6, color="#A6CEE3", edgecolor="black",
                    error_kw=ends, label=name,
                )  # fmt: skip
                for place, mean in zip(places, means, strict=True):
                    text = f"{mean:.{1 if task.percent else 3}f}"
                    inside: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points"}
                    plot.annotate(text, (0, place), va="center", fontsize=8, **inside)
            else:
                plot.plot(means, places, linestyle="none", label=name, **_style(index))
        plot.set_xlim(left=0)  # bars start at zero
        plot.margins(x=0.12)
        plot.set_yticks(range(len(values)), values)
        plot.invert_yaxis()
        plot.set_xlabel(task.axis)
        if len(lines) > 1:
            plot.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return into[0]


def _lines(plot: Axes, lines: Mapping[str, Mapping[str, tuple[float, float]]], values: list[str]) -> None:
    for index, (name, points) in enumerate(lines.items()):
        places = [values.index(value) for value in points]
        means, spreads = zip(*points.values(), strict=True)
        # Colours repeat after nine lines; the later lines are dashed.
        looks = {**_style(index), "linestyle": "-" if index < len(COLOURS) else "--"}
        wide = 2.6 if name == METHODS[FEDERATED].label else 1.2
        plot.errorbar(places, means, yerr=spreads, label=name, capsize=3, linewidth=wide, **looks)
    plot.set_xticks(range(len(values)), values)
    plot.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _heat(
    plot: Axes, lines: Mapping[str, Mapping[str, tuple[float, float]]], values: list[str], task: Task
) -> None:
    grid = [[points.get(value, (float("nan"), 0.0))[0] for value in values] for points in lines.values()]
    known = [value for row in grid for value in row if value == value]
    low, high = min(known), max(known)
    plot.grid(visible=False)
    plot.imshow(grid, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            ink = "white" if value < (low + high) / 2 else "black"
            plot.text(
                x, y, f"{value:.{1 if task.percent else 2}f}", ha="center", va="center", color=ink, fontsize=8
            )
    plot.set_xticks(range(len(values)), values)
    plot.set_yticks(range(len(lines)), list(lines))


def _by_round(found: Sequence[tuple[Mapping[str, Any], list[Json]]]) -> Drawing:
    """Plot the student's metric by round, a line per cell; with one cell, also the other methods'."""
    task = task_of(found[0][1][0])
    lines: dict[str, dict[int, list[float]]] = {}
    for labels, results in found:
        cell = ", ".join(f"{key} {value}" for key, value in labels.items())
        for result in results:
            for point in Result.from_json(result).points:
                if point.series == "student" or (len(found) == 1 and point.series in row_labels()):
                    name = row_labels()[point.series] if len(found) == 1 else cell
                    value = task.read({task.decides: point.test})
                    lines.setdefault(name, {}).setdefault(point.round, []).append(value)
    into: list[Drawing] = []
    with _figure(8, 4.2, into) as plot:
        for index, (name, points) in enumerate(lines.items()):
            plot.plot(list(points), [fmean(v) for v in points.values()], label=name, **_style(index))
        plot.set_xlabel("round")
        plot.set_ylabel(task.axis)
        last = max(max(points) for points in lines.values())
        plot.set_xlim(0.5, last + 0.5)
        plot.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if 1 < len(lines) <= 16:
            plot.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return into[0]


def _against(
    found: Sequence[tuple[Mapping[str, Any], list[Json]]], cost: str, unit: str, scale: float
) -> Drawing:
    """Plot the primary metric against a cost (log axis): a marker per method, a point per cell."""
    task = task_of(found[0][1][0])
    points: dict[str, list[tuple[float, float]]] = {}
    for labels, results in found:
        for row in _summary(labels, results):
            if row[cost]:
                points.setdefault(row["who"], []).append((row[cost] / scale, task.read(row)))
    into: list[Drawing] = []
    with _figure(8, 4.2, into) as plot:
        for index, (who, places) in enumerate(points.items()):
            across, up = zip(*places, strict=True)
            plot.scatter(across, up, label=row_labels()[who], s=36, alpha=0.85, **_style(index))
        plot.set_xscale("log")
        plot.set_xlabel(f"{unit} (logarithmic)")
        plot.set_ylabel(task.axis)
        plot.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return into[0]
