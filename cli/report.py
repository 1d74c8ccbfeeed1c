"""``feddistill report``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("run", type=UserPath())
def report(run: Path) -> None:
    """Regenerate RUN's report: report.html, tables as CSV, plots as SVG, TensorBoard logs.

    For the folder of a study: study.html, runs.csv, summary.csv, table.tex, plots.
    """
    from feddistill import report as reports
    from feddistill.report import studies

    write = studies.write if (run / "study.yaml").is_file() else reports.write
    click.echo(f"report: {write(run)}")
