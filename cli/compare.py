"""``feddistill compare``."""

import json
from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Compare the metrics and costs of complete RUNS, and list the settings in which they differ."""
    from dataclasses import asdict

    from feddistill.report import comparison, size

    found = comparison.side_by_side(runs)
    if as_json:
        click.echo(json.dumps([asdict(run) for run in found], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(run.run for run in found))
    for key in found[0].settings:
        table.add_row(key, *(str(run.settings[key]) for run in found), style="dim")
    for who in dict.fromkeys(who for run in found for who in run.figures):
        table.add_row(who, *(f"{run.figures[who]:.3f}" if who in run.figures else "-" for run in found))
    table.add_row("uploaded", *(size(run.uplink) for run in found))
    table.add_row("seconds", *(f"{run.seconds:.0f}" for run in found))
    Console().print(table)
