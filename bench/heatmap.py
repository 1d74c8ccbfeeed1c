"""The result of ``bench.robustness`` as a table and a heat map."""

from pathlib import Path
from statistics import fmean
from typing import Any

from bench.draw import STYLE
from feddistill.aggregation.attacks import ATTACKS
from feddistill.aggregation.rules import ASSUMED

HONEST, ALONE, LYING = "ten honest", "the six honest alone", "2 second_best, 2 least_likely"


def table(found: dict[str, Any]) -> str:
    """Markdown tables: teachers with four attackers of ten, and students."""
    teachers, count = found["teacher_accuracy"], "4"
    attacks = [name for name in ATTACKS if name in teachers]
    lines = [
        "| teacher's accuracy, % | honest | " + " | ".join(attacks) + " |",
        "|---" * (len(attacks) + 2) + "|",
    ]
    for key in found["rules"]:
        cells = [teachers[HONEST]["0"][key], *(teachers[name][count][key] for name in attacks)]
        lines.append(f"| {key} | " + " | ".join(f"{100 * fmean(cell):.0f}" for cell in cells) + " |")
    students = found["student_accuracy"]
    lines += [
        "",
        f"| student's accuracy on the test set, % (each seed) | {HONEST} | {ALONE} | {LYING} |",
        "|---|---|---|---|",
    ]
    for key, cells in students.items():
        text = (_cell(cells.get(name)) for name in (HONEST, ALONE, LYING))
        lines.append(f"| {key} | {' | '.join(text)} |")
    e = found["machine"]
    note = (
        f"Means over seeds {', '.join(map(str, found['seeds']))}; {found['clients']} clients, Dirichlet 0.3, "
        f"the quickstart's models; {e['cpu']}, torch {found['versions']['torch']}. {ASSUMED}"
    )
    return "\n".join([*lines, "", note])


def _cell(values: list[float] | None) -> str:
    if values is None:
        return ""
    return f"{100 * fmean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def draw(found: dict[str, Any], path: Path) -> Path:
    """Write the heat map beside the result: rules by attacks, with two and four attackers of ten."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    teachers = found["teacher_accuracy"]
    keys, attacks = list(found["rules"]), [name for name in ATTACKS if name in teachers]
    target = path.with_suffix(".svg")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 0.26 * len(keys) + 1.9), layout="constrained")
        for place, (axes, count) in enumerate(
            zip(figure.subplots(1, 2, sharey=True), ("2", "4"), strict=True)
        ):
            columns = [(HONEST, "0"), *((name, count) for name in attacks)]
            grid = [[100 * fmean(teachers[name][f][key]) for name, f in columns] for key in keys]
            axes.imshow(
                grid, cmap="cividis", vmin=0, vmax=80, aspect="auto"
            )  # readable for colour-blind readers and in greyscale
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    ink = "white" if value < 40 else "black"
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6, color=ink)
            labels = [name for name, _ in columns]
            axes.set_xticks(range(len(columns)), labels, rotation=60, ha="right", fontsize=7)
            axes.set_title(f"{count} attackers of ten: teacher's accuracy, %", fontsize=9)
            if not place:
                axes.set_yticks(range(len(keys)), keys, fontsize=7)
            axes.tick_params(length=0)
        figure.savefig(target, metadata={"Date": None}, bbox_inches="tight")
    return target
