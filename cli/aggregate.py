"""``feddistill aggregate``."""

from pathlib import Path
from typing import Any

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("run", type=UserPath())
@click.option("--rule", help="Short for --set aggregation.rule=RULE.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting of aggregation; may be repeated.",
)
@click.option(
    "--late",
    multiple=True,
    type=UserPath(),
    metavar="PAYLOAD",
    help="A payload that arrived too late, with its envelope (.json) beside it; may be repeated.",
)
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    help="Directory of the new run.  [default: RUN-aggregated]",
)
def aggregate(
    run: Path, rule: str | None, overrides: tuple[str, ...], late: tuple[Path, ...], out: Path | None
) -> None:
    """Re-aggregate the stored answers of RUN into new teachers, without contacting the clients.

    RUN is not changed: the result is a new run. `feddistill distill` trains a student from its teachers,
    `feddistill train --resume` completes the run.

    \b
    Example:
      feddistill aggregate runs/quickstart --rule median
    """
    from feddistill.progress import TerminalProgress
    from feddistill.store.run_directory import free

    chosen = (f"aggregation.rule={rule}",) if rule else ()
    progress = TerminalProgress()
    with progress.step("load torch and transformers"):
        from feddistill.runs import rerun

    out = out or free(run.with_name(f"{run.name}-aggregated"))
    decided = rerun.aggregate(run, out, (*chosen, *overrides), late=late, progress=progress)
    _print(decided)
    click.echo(f"run: {out}")


def _print(decided: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "round", "answers", "refused", "teacher's accuracy", "cross-entropy", "mass", title="Teachers"
    )
    for round_ in decided:
        found = round_["teacher"]["diagnostics"]
        values = (found["teacher_accuracy"], found["teacher_cross_entropy"], found["mass"])
        shown = ["-" if value is None else f"{value:.3f}" for value in values]
        counted = str(len(round_["ledger"]["payloads"]))
        table.add_row(str(round_["round"]), counted, ", ".join(round_["refused"]) or "-", *shown)
    Console().print(table)
