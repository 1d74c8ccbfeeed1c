"""``feddistill distill``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("run", type=UserPath())
@click.option("--student", metavar="MODEL", help="Student model: name on the hub, or a folder.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of student or distill."
)
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    help="Directory of the new run.  [default: RUN-distilled]",
)
def distill(run: Path, student: str | None, overrides: tuple[str, ...], out: Path | None) -> None:
    """Distill another student from the stored teachers of RUN, without contacting the clients.

    \b
    Examples:
      feddistill distill runs/quickstart --set student.model.layers=[0,3] --out runs/small
      feddistill distill runs/quickstart-aggregated
    """
    from feddistill.progress import TerminalProgress
    from feddistill.store.run_directory import free

    source = "{kind: hub, name: " + str(student) + "}"
    chosen = (f"student.model.source={source}", "student.model.layers=null") if student else ()
    progress = TerminalProgress()
    with progress.step("load torch and transformers"):
        from feddistill import report
        from feddistill.runs import rerun

    out = out or free(run.with_name(f"{run.name}-distilled"))
    result = rerun.distill(run, out, (*chosen, *overrides), progress=progress)
    page = report.write(out)
    report.print_table(result)
    click.echo(f"run: {out}\nreport: {page}")
