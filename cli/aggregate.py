"""``feddistill aggregate``."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--rule", help="Short for --set aggregation.rule=RULE.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of aggregation."
)
@click.option(
    "--late",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PAYLOAD",
    help="An answer that came after its round was closed, its envelope (.json) beside it; may be repeated.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="A new run.  [default: RUN-aggregated]"
)
def aggregate(
    run: Path, rule: str | None, overrides: tuple[str, ...], late: tuple[Path, ...], out: Path | None
) -> None:
    """Make other teachers of the answers that RUN stored; no client is asked again.

    RUN is not changed: a new run is made. `feddistill distill` trains a student from its teachers,
    `feddistill train --resume` goes on to the whole run.

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
        figures = (found["teacher_accuracy"], found["teacher_cross_entropy"], found["mass"])
        shown = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        counted = str(len(round_["ledger"]["payloads"]))
        table.add_row(str(round_["round"]), counted, ", ".join(round_["refused"]) or "-", *shown)
    Console().print(table)
