"""``feddistill evaluate``."""

import json
from pathlib import Path
from typing import Any

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("run", type=UserPath())
@click.option(
    "--texts",
    type=UserPath(),
    help="File with labelled texts (csv, jsonl, parquet), instead of the run's test set.",
)
@click.option("--text-column", default="text", show_default=True, help="Column with the texts.")
@click.option("--label-column", default="label", show_default=True, help="Column with the labels.")
@click.option("--encoding", help="Encoding of the file, if it is not UTF-8, e.g. latin-1.")
@click.option("--delimiter", help="Character between the columns of a csv or tsv file.")
@click.option("--prompt-column", help="Column with the prompt that precedes each text.")
@click.option("--messages-column", help="Column with conversations instead of texts.")
@click.option("--prompt-separator", help="Text between prompt and text.")
@click.option("--pair-column", help="Column with the second text of each example.")
@click.option("--question-column", help="Column with the question about each passage.")
@click.option(
    "--benchmark", metavar="NAME", help="Benchmark on the hub, e.g. glue/sst2; see docs/evaluation.md."
)
@click.option("--path", type=UserPath(), help="Local folder with the benchmark, in the hub's layout.")
@click.option("--tasks", metavar="A,B", help="Tasks of lm-evaluation-harness (extra eval).")
@click.option(
    "--task-folder",
    type=UserPath(),
    help="Folder with YAML files of custom tasks for --tasks.",
)
@click.option("--limit", type=click.IntRange(1), help="Evaluate only the first N examples.")
@click.option("--window", type=click.IntRange(2), help="Context window in tokens, for wikitext.")
@click.option("--stride", type=click.IntRange(1), help="Tokens by which the window advances, for wikitext.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    run: Path,
    texts: Path | None,
    text_column: str,
    label_column: str,
    encoding: str | None,
    delimiter: str | None,
    prompt_column: str | None,
    messages_column: str | None,
    prompt_separator: str | None,
    pair_column: str | None,
    question_column: str | None,
    benchmark: str | None,
    path: Path | None,
    tasks: str | None,
    task_folder: Path | None,
    limit: int | None,
    window: int | None,
    stride: int | None,
    as_json: bool,
) -> None:
    """Evaluate RUN's student, selected by its metric on the validation set.

    With --benchmark or --tasks, RUN may also be a model folder written by `feddistill export` or by
    transformers.

    \b
    Example:
      feddistill evaluate runs/warm --benchmark glue/sst2 --path ~/glue
    """
    from feddistill.errors import ConfigError

    ways = {"--texts": texts, "--benchmark": benchmark, "--tasks": tasks}
    if len(given := [name for name, value in ways.items() if value is not None]) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: give one")
    belongs = {
        "--encoding": (encoding, "--texts"),
        "--delimiter": (delimiter, "--texts"),
        "--prompt-column": (prompt_column, "--texts"),
        "--messages-column": (messages_column, "--texts"),
        "--prompt-separator": (prompt_separator, "--texts"),
        "--pair-column": (pair_column, "--texts"),
        "--question-column": (question_column, "--texts"),
        "--path": (path, "--benchmark"),
        "--window": (window, "--benchmark"),
        "--stride": (stride, "--benchmark"),
        "--task-folder": (task_folder, "--tasks"),
    }
    for option, (value, to) in belongs.items():
        if value is not None and ways[to] is None:
            raise ConfigError(f"{option} needs {to}")
    if limit is not None and benchmark is None and tasks is None:
        raise ConfigError("--limit needs --benchmark or --tasks")
    if benchmark is not None:
        figures = _benchmark(run, benchmark, path, limit, window, stride)
    elif tasks is not None:
        figures = _tasks(run, tasks, limit, task_folder)
    else:
        columns = {
            "text_column": text_column,
            "label_column": label_column,
            "prompt_column": prompt_column,
            "messages_column": messages_column,
            "prompt_separator": prompt_separator or "",
            "pair_column": pair_column,
            "question_column": question_column,
            "encoding": encoding,
            "delimiter": delimiter,
        }
        figures = _own(run, texts, columns)
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    for name, value in figures.pop("results", {}).items():
        figures |= {f"{name} {metric}": number for metric, number in value.items() if metric != "alias"}
    width = max(14, *map(len, figures))
    for name, value in figures.items():
        click.echo(f"{name:{width}} {value:.4f}" if isinstance(value, float) else f"{name:{width}} {value}")


def _own(run: Path, texts: Path | None, columns: dict[str, str | None]) -> dict[str, Any]:
    from feddistill import config as configuration
    from feddistill.runs import experiment

    own = None
    if texts is not None:
        own = configuration.texts(texts, columns, "--texts")
    return experiment.evaluate(run, own)


def _benchmark(
    run: Path, name: str, path: Path | None, limit: int | None, window: int | None, stride: int | None
) -> dict[str, Any]:
    from feddistill.config import presets

    preset = presets.find(name)  # before torch is imported
    from feddistill import benchmarks
    from feddistill.progress import TerminalProgress
    from feddistill.runs import trained_models

    request = benchmarks.Request(preset, path, limit, window, stride)
    return benchmarks.evaluate(trained_models.load(run), request, TerminalProgress())


def _tasks(run: Path, tasks: str, limit: int | None, folder: Path | None) -> dict[str, Any]:
    from feddistill.benchmarks import harness
    from feddistill.runs import trained_models

    return harness.evaluate(trained_models.load(run), tasks.split(","), limit=limit, folder=folder)
