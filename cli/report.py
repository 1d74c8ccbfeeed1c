"""``feddistill report``."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN's report again: report.html, the tables as CSV, the figures as SVG, TensorBoard logs."""
    from feddistill import report as reports

    click.echo(f"report: {reports.write(run)}")
