"""``feddistill sweep``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("study", type=UserPath())
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the study: seeds=[0], grid.KEY=[...].",
)
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    help="Folder of the study.  [default: runs/NAME]",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of parallel runs, each in its own process.",
)
@click.option("--list", "only_list", is_flag=True, help="Print the names of the runs and exit.")
def sweep(study: Path, overrides: tuple[str, ...], out: Path | None, jobs: int, only_list: bool) -> None:
    """Run STUDY, a grid of settings and seeds. Completed runs are skipped, so a killed study can be resumed.

    \b
    Example:
      feddistill sweep examples/studies/methods.yaml --set seeds=[0]
    """
    from feddistill.runs import study as studies

    chosen = studies.load(study, overrides)
    if only_list:
        for cell in studies.cells(chosen):
            click.echo(cell.name)
        return
    from feddistill.progress import TerminalProgress

    progress = TerminalProgress()
    with progress.step("load torch and transformers"):
        from feddistill import report
        from feddistill.report import studies as pages

    out = out or Path("runs") / chosen.name
    failed = studies.sweep(chosen, out, jobs=jobs, progress=progress, after=report.write)
    if len(failed) < len(studies.cells(chosen)):
        click.echo(f"report: {pages.write(out)}")
    if failed:
        click.echo(f"{len(failed)} runs failed: {', '.join(failed)}", err=True)
        raise click.exceptions.Exit(1)
