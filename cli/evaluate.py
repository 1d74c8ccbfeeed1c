"""``feddistill evaluate``."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--texts",
    type=click.Path(path_type=Path),
    help="A file of your own (csv, jsonl, parquet) instead of the run's test set.",
)
@click.option("--text-column", default="text", show_default=True)
@click.option("--label-column", default="label", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(run: Path, texts: Path | None, text_column: str, label_column: str, as_json: bool) -> None:
    """Evaluate RUN's student: the round that was best on validation."""
    from feddistill import experiment
    from feddistill.config.data import FileSource

    own = None
    if texts is not None:
        own = FileSource(path=texts, text_column=text_column, label_column=label_column)
    figures = experiment.evaluate(run, own)
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            click.echo(f"{name:14} {value:.4f}" if isinstance(value, float) else f"{name:14} {value}")
