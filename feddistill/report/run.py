"""The report of a run: a self-contained page, tables as CSV, plots as SVG, TensorBoard logs."""

import csv
import io
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table

from feddistill import config as configuration
from feddistill.config.methods import row_labels
from feddistill.config.tasks import Task, task_named
from feddistill.data import Skew
from feddistill.errors import RunError
from feddistill.report import plots
from feddistill.report.result import Result
from feddistill.store import layout
from feddistill.store.layout import CONFIG, METRICS_TABLE, REPORT, RESULT, ROUNDS_TABLE
from feddistill.store.records import Metrics
from feddistill.store.run_directory import Json, RunDirectory


def write(out: Path) -> Path:
    """Write the report of a complete run into its directory; returns the page.

    Raises:
        RunError: The run has no result yet.
    """
    run = RunDirectory.open(out)
    try:
        configuration.load_stored(run.path(CONFIG))  # raises if it was edited
        if not run.path(RESULT).exists():
            raise RunError(f"{out} is not complete; go on with: feddistill train --resume --out {out}")
        result, skew = run.read_json(RESULT), _skew(run.read_json(layout.SKEW))
        drawn = plots.draw(Result.from_json(result), skew)
        for name, svg in drawn.items():
            run.write_text(layout.plot(name), svg)
        run.write_text(ROUNDS_TABLE, as_csv([dict(row) for row in Result.from_json(result).by_round]))
        run.write_text(METRICS_TABLE, as_csv([{"who": who, **m} for who, m in metric_rows(result)]))
        _tensorboard(run, result)
        return run.write_text(
            REPORT,
            rendered(
                "page.html",
                result=result,
                task=task_of(result),
                rows=[(row_labels()[who], m) for who, m in metric_rows(result)],
                skew=skew,
                skew_lines=skew_lines(skew),
                figures=drawn,
                config=run.read_bytes(CONFIG).decode(),
                traffic=traffic_rows(result),
                phases=phase_rows(result),
                size=size,
            ),
        )
    finally:
        run.close()


def rendered(template: str, **facts: object) -> str:
    """Render a self-contained page from a template of this package."""
    folder = files("feddistill.report")
    text, style = (folder.joinpath(name).read_text(encoding="utf-8") for name in (template, "style.css"))
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    return page.render(style=style, **facts)


def task_of(result: Json) -> Task:
    """The task of a run; results of old versions, without a task, are of classification."""
    return task_named(result.get("task", "classification"))


def metric_rows(result: Json) -> list[tuple[str, Metrics]]:
    """Row key and metrics on the test set, in the order of the table."""
    typed = Result.from_json(result)
    metrics = typed.metrics
    rows = [("student", typed.student)]
    rows += [(f"clients_{when}", mean) for when, mean in typed.clients.items()]
    for who in row_labels():
        name, _, which = who.rpartition("_")
        if which in ("mean", "best") and name in metrics:
            rows.append((who, metrics[name][which]))
        elif who in metrics and who != "student":
            rows.append((who, metrics[who]))
    return rows


def print_table(result: Json) -> None:
    """Print the metrics and costs of a run."""
    shown = task_of(result).shown
    table = Table("", *shown.values(), title=f"{result['name']}, seed {result['seed']}: test set")
    for who, m in metric_rows(result):
        cells = [f"{m[key]:.3f}" for key in shown]
        table.add_row(row_labels()[who], *cells, style="bold" if who == "student" else None)
    console = Console()
    console.print(table)
    sent = Result.from_json(result).bytes
    console.print(
        f"uploaded {size(sent.uplink)}, sent back {size(sent.downlink)}, proxy set {size(sent.proxy)}; "
        f"FedAvg of this student would upload {size(sent.fedavg_uplink_same_rounds)}, "
        f"its LoRA {size(sent.lora_uplink_same_rounds)}",
        highlight=False,
    )
    console.print(
        f"{result['seconds']['total']:.0f} s of work, {sum(result['flops'].values()) / 1e12:.1f} TFLOP, "
        f"peak memory {size(result['peak_memory_bytes'])}",
        highlight=False,
    )


def traffic_rows(result: Json) -> list[tuple[str, str]]:
    """Rows of the traffic table: description and size."""
    sent = Result.from_json(result).bytes
    return [
        ("clients upload: answers and descriptions, all rounds", size(sent.uplink)),
        ("of that, descriptions (sizes, class counts)", size(sent.descriptions)),
        ("server sends: requests and teachers, all rounds", size(sent.downlink)),
        ("proxy texts, once to each client", size(sent.proxy)),
        (
            "FedAvg of the weights that the student trains (float32) would upload, same rounds",
            size(sent.fedavg_uplink_same_rounds),
        ),
        ("times as much as the answers", f"{sent.fedavg_uplink_same_rounds / sent.uplink:,.1f}×"),
        (
            "federated LoRA of the student (float32, `fedlora.rank`) would upload, same rounds",
            size(sent.lora_uplink_same_rounds),
        ),
        ("an answer to one row (text or token), envelope included", f"{sent.a_row:.2f} B"),
    ]


def phase_rows(result: Json) -> list[tuple[str, str, str]]:
    """Rows of the cost table: phase, seconds, TFLOP."""
    typed = Result.from_json(result)
    return [
        (name.replace("_", " "), f"{typed.seconds[name]:.1f}", f"{flops / 1e12:.2f}")
        for name, flops in typed.flops.items()
    ]


def skew_lines(skew: Skew) -> list[str]:
    """The skew report as a table in plain text."""
    width = max(map(len, (*skew.clients, "proxy (labelled)")))
    if not skew.labels:
        texts = zip(skew.clients, skew.examples, strict=False)
        return [*(f"{client.ljust(width)}  {count} texts" for client, count in texts), *_skew_words(skew)]
    if len(skew.labels) > plots.WRITTEN:
        return [*_many_labels(skew, width), *_skew_words(skew)]
    columns = [max(len(label), 4) for label in skew.labels]

    def line(name: str, cells: tuple[object, ...], total: object) -> str:
        padded = (str(cell).rjust(column) for cell, column in zip(cells, columns, strict=True))
        return f"{name.ljust(width)}  {'  '.join(padded)}  {str(total).rjust(6)}"

    return [
        line("", skew.labels, "total"),
        *(
            line(client, counts, sum(counts))
            for client, counts in zip(skew.clients, skew.counts, strict=True)
        ),
        line("proxy (labelled)", skew.proxy_counts, sum(skew.proxy_counts)),
        *_skew_words(skew),
    ]


def _many_labels(skew: Skew, width: int) -> Iterator[str]:
    """Skew table without a column per label, for many labels."""
    yield f"{''.ljust(width)}  labels   total  its most frequent label"
    for name, counts in (
        *zip(skew.clients, skew.counts, strict=True),
        ("proxy (labelled)", skew.proxy_counts),
    ):
        has, most = sum(count > 0 for count in counts), max(counts)
        top = f"{skew.labels[counts.index(most)]}: {most}" if most else ""
        yield f"{name.ljust(width)}  {str(has).rjust(6)}  {str(sum(counts)).rjust(6)}  {top}"


def _skew_words(skew: Skew) -> list[str]:
    if skew.size_ratio is None:
        divided = "the partition of the private texts is known only to the clients"
    else:
        labels = "no labels, so no skew of them"
        if skew.non_iid is not None:
            labels = f"non-IID {skew.non_iid:.3f} (mean total variation from the pool)"
        divided = f"{labels}; largest client {skew.size_ratio:.1f} times the smallest"
    return [
        divided,
        f"texts: proxy {skew.proxy_examples}, test {skew.test_examples}, validation "
        f"{skew.validation_examples}",
        f"{skew.test_also_public} test texts also occur in proxy or private texts",
    ]


def size(count: float) -> str:
    """Format a number of bytes with a suitable unit.

    >>> size(1234567)
    '1.23 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _skew(stored: Json) -> Skew:
    lists = {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
    return Skew(**{**stored, **lists, "counts": tuple(map(tuple, stored["counts"]))})


def as_csv(rows: list[Json]) -> str:
    """Rows with the same keys, as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _tensorboard(run: RunDirectory, result: Json) -> None:
    """Log the primary metric of every series by round, from the result: no duplicates after a resume."""
    from torch.utils.tensorboard import SummaryWriter

    run.remove(layout.TENSORBOARD)
    typed = Result.from_json(result)
    metric = typed.judged_by.decides
    with SummaryWriter(str(run.path(layout.TENSORBOARD))) as board:
        for point in typed.points:
            board.add_scalar(f"test_{metric}/{point.series}", point.test, point.round)
            board.add_scalar(f"validation_{metric}/{point.series}", point.validation, point.round)
        for name, metrics in metric_rows(result):
            board.add_scalar(f"final_test_{metric}/{name}", metrics[metric], typed.rounds)
