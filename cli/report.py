"""``feddistill report``."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN's report again: report.html, the tables as CSV, the figures as SVG, TensorBoard logs.

    Of a study's folder: study.html, runs.csv, summary.csv, table.tex, figures.
    """
    from feddistill import report as reports
    from feddistill.report import studies

    write = studies.write if (run / "study.yaml").is_file() else reports.write
    click.echo(f"report: {write(run)}")
