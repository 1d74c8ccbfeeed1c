"""Read texts from the package, files or the hub into one form, ``Table``."""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from feddistill.config import presets
from feddistill.config.data import Columns, EmbeddedSource, FileSource, HubSource, PresetSource, Source
from feddistill.data import benchmark, hub
from feddistill.errors import DataError
from feddistill.types import Span

EMBEDDED_COLUMNS = {"wordnet_topics": ("label", None), "sotu_eras": ("era", "era")}
"""Label and source columns of the embedded sets."""

READABLE = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")


@dataclass(frozen=True, slots=True)
class Table:
    """Texts as they are read: labels are names, and nothing is split yet."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    sources: tuple[str, ...] | None
    starts: tuple[int, ...] | None = None
    """First character of each text after its prompt or question."""
    unlabelled: str = "has no label column"
    """The error if labels are needed and there are none."""
    questions: bool = False
    """True if the prompts are questions."""
    answers: tuple[tuple[Span, ...], ...] | None = None
    """The right answers to each question."""


def read(source: Source, name: str) -> Table:
    """Read ``source``; ``name``, as ``data.test.source``, is its name in errors.

    Raises:
        DataError: Missing file or data set, missing column, unreadable or empty text, no examples.
    """
    match source:
        case EmbeddedSource():
            return _embedded(source.name)
        case FileSource():
            return _files(source, name)
        case HubSource():
            return _hub(source, name)
        case PresetSource():
            return _preset(source, name)


@cache
def _embedded(name: str) -> Table:
    packed = files("feddistill.data").joinpath("embedded", f"{name}.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    label, origin = EMBEDDED_COLUMNS[name]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return _table(columns, Columns(label_column=label, source_column=origin), name, name)


def _files(source: FileSource, name: str) -> Table:
    path = source.path
    try:
        inside = sorted(path.iterdir()) if path.is_dir() else None
        exists = path.is_file()
    except OSError as error:
        raise DataError(f"{name}: cannot read {path}: {error.strerror}") from None
    if inside is not None:
        paths = [p for p in inside if p.suffix.lower() in READABLE]
        if len({p.suffix.lower() for p in paths}) > 1:
            raise DataError(f"{name}: {path} mixes formats ({', '.join(p.name for p in paths[:5])})")
        if not paths:
            raise DataError(f"{name}: {path} holds no file that ends in {', '.join(READABLE)}")
    elif exists:
        paths = [path]
    else:
        raise DataError(f"{name}: no such file or folder: {path}")
    columns: dict[str, list[Any]] = {}
    for index, file in enumerate(paths):
        part = _one_file(file, source, name)
        if index and set(part) != set(columns):
            raise DataError(
                f"{name}: {file} has columns {sorted(part)}, {paths[0].name} has {sorted(columns)}"
            )
        for key, values in part.items():
            columns.setdefault(key, []).extend(values)
    settings = (
        source if paths[0].suffix.lower() != ".txt" else source.model_copy(update={"label_column": None})
    )
    return _table(columns, settings, name, path.stem)


def _one_file(file: Path, source: FileSource, name: str) -> dict[str, list[Any]]:
    try:
        match file.suffix.lower():
            case ".txt":
                return {source.text_column: _lines(file)}
            case ".jsonl" | ".ndjson":
                return _objects([_json(line, row) for row, line in enumerate(_lines(file), 1)])
            case _:
                return _frame(file, name)
    except OSError as error:
        raise DataError(f"{name}: cannot read {file}: {error.strerror or error}") from None
    except (ValueError, TypeError) as error:  # parsers' own; UnicodeDecodeError too
        raise DataError(f"{name}: {file} is malformed: {' '.join(str(error).split())}") from None


def _json(line: str, row: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"object {row}: {error.msg} at its character {error.pos + 1}") from None


def _objects(rows: list[Any]) -> dict[str, list[Any]]:
    """Columns of JSON objects; missing keys are ``None``."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    keys = dict.fromkeys(str(key) for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in keys}


def _frame(file: Path, name: str) -> dict[str, list[Any]]:
    import pandas
    import pyarrow

    try:
        match file.suffix.lower():
            case ".csv" | ".tsv":
                separator = "\t" if file.suffix.lower() == ".tsv" else ","
                frame = pandas.read_csv(
                    file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8"
                )
                if not isinstance(
                    frame.index, pandas.RangeIndex
                ):  # pandas takes the first field for an index
                    raise ValueError("rows have more fields than the header; quote texts that hold commas")
            case ".json":
                frame = pandas.DataFrame(json.loads(file.read_text(encoding="utf-8")))
            case ".parquet":
                frame = pandas.read_parquet(file)
            case other:
                raise DataError(f"{name}: {file} ends in {other!r}; readable are {', '.join(READABLE)}")
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    return {str(key): frame[key].tolist() for key in frame.columns}


def _lines(file: Path) -> list[str]:
    # Not splitlines, which also splits at form feeds and U+2028.
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def _hub(source: HubSource, name: str) -> Table:
    loaded = hub.load(source.name, source.subset, source.split, source.revision, name)
    return _table(hub.columns(loaded), source, name, Path(source.name).name)


def _preset(source: PresetSource, name: str) -> Table:
    preset = presets.find(source.name)
    rows = benchmark.read(preset, source.split, source.path, source.revision, name)
    if preset.kind == "question_answering":
        columns = Columns(
            text_column="context", label_column=None, source_column="title", question_column="question"
        )
        return _table(rows, columns, name, f"{source.name}/{source.split}")
    if preset.kind == "language":
        texts = tuple(benchmark.detokenise(page) for page in benchmark.pages(rows["text"]))
        labels = None
    else:
        texts = benchmark.texts(preset, rows)
        labels = None if source.split in preset.hidden else benchmark.labels(preset, rows, name)
    unlabelled = "has no labels"
    if source.split in preset.hidden:
        unlabelled = f"the labels of {source.name}'s {source.split} split are hidden; take {preset.measured}"
    ids = tuple(f"{source.name}/{source.split}/{row}" for row in range(len(texts)))
    return Table(ids, texts, labels, None, unlabelled=unlabelled)


def _is_torn(text: str) -> bool:
    """True if the text has lone surrogates, which escaped JSON may contain and UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _table(columns: Mapping[str, Sequence[Any]], settings: Columns, name: str, stem: str) -> Table:
    """Select and check the columns; every example must be complete."""

    def column(setting: str, key: str | None) -> tuple[str, ...] | None:
        if key is None:
            return None
        if key not in columns:
            known = ", ".join(map(repr, columns)) or "none"
            raise DataError(f"{name}: {setting} = {key!r} is not a column; there are {known}")
        for row, value in enumerate(columns[key]):
            if value is not None and not isinstance(value, str | int | float):
                raise DataError(
                    f"{name}: row {row} has a {type(value).__name__} for {key!r}, not a text or number"
                )
            if value is None or value != value or not str(value).strip():
                raise DataError(f"{name}: row {row} has no {key!r}")
            if isinstance(value, str) and not value.isascii() and _is_torn(value):
                raise DataError(f"{name}: row {row} has half a character (a lone surrogate) in {key!r}")
        return tuple(str(value) for value in columns[key])

    texts = column("text_column", settings.text_column)
    assert texts is not None
    if not texts:
        raise DataError(f"{name}: no examples")
    prompts = column("prompt_column", settings.prompt_column)
    questions = column("question_column", settings.question_column)
    answers = None
    if questions is not None:
        prompts = tuple(f"{question.strip()}\n" for question in questions)
        if settings.answers_column in columns:
            answers = benchmark.answers(columns[settings.answers_column], texts, name)
    if prompts is not None:
        texts = tuple(prompt + text for prompt, text in zip(prompts, texts, strict=True))
    return Table(
        ids=tuple(f"{stem}/{row}" for row in range(len(texts))),
        texts=texts,
        labels=column("label_column", settings.label_column),
        sources=column("source_column", settings.source_column),
        starts=None if prompts is None else tuple(map(len, prompts)),
        questions=questions is not None,
        answers=answers,
    )
