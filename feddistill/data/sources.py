"""Read texts from the package, files or the hub into one form, ``Table``."""

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

from feddistill.config import presets
from feddistill.config.data import (
    Columns,
    DataConfig,
    EmbeddedSource,
    FileSource,
    GivenPartition,
    HubSource,
    PresetSource,
    RemotePartition,
    Source,
)
from feddistill.data import benchmark, formats, hub
from feddistill.data.columns import Where, conversations, find, is_missing, known, names, nowhere
from feddistill.data.columns import labels as label_names
from feddistill.errors import DataError
from feddistill.types import Span

EMBEDDED_COLUMNS = {"wordnet_topics": ("label", None), "sotu_eras": ("era", "era")}
"""Label and source columns of the embedded sets."""

BESIDE = ("prompt_column", "question_column", "pair_column")
"""Settings of a second column of texts; a source has at most one."""


@dataclass(frozen=True, slots=True)
class Table:
    """Texts as they are read: labels are names, and nothing is split yet."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[str | None, ...] | None
    """``None`` for a row without a label."""
    sources: tuple[str, ...] | None
    starts: tuple[int, ...] | None = None
    """First character of each text after its prompt or question, or of a pair's second text."""
    unlabelled: str = "has no label column"
    """The error if labels are needed and there are none."""
    beside: str | None = None
    """The setting of the column that stands before or after each text."""
    answers: tuple[tuple[Span, ...] | None, ...] | None = None
    """The right answers to each question; ``None`` for a row in which they are missing."""
    where: Where = nowhere
    """The place of a row, for errors."""
    conversations: bool = False
    """True if texts are the messages of conversations as JSON."""

    @property
    def questions(self) -> bool:
        """True if texts are questions on passages."""
        return self.beside == "question_column"


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


def _parts(source: FileSource, name: str) -> list[formats.File]:
    path = source.path
    try:
        inside = sorted(path.iterdir()) if path.is_dir() else None
        exists = path.is_file()
    except OSError as error:
        raise DataError(f"{name}: cannot read {path}: {error.strerror}") from None
    if inside is not None:
        paths = [p for p in inside if formats.ending(p)]
        if len({formats.ending(p) for p in paths}) > 1:
            raise DataError(f"{name}: {path} mixes formats ({', '.join(p.name for p in paths[:5])})")
        if not paths:
            raise DataError(f"{name}: {path} holds no file that ends in {formats.readable()}")
    elif exists:
        paths = [path]
    else:
        raise DataError(f"{name}: no such file or folder: {path}")
    return [formats.read(file, source, name) for file in paths]


def _files(source: FileSource, name: str) -> Table:
    parts = _parts(source, name)
    first = parts[0]
    columns: dict[str, list[Any]] = {key: [] for key in first.columns}
    for part in parts:
        if set(part.columns) != set(columns):
            raise DataError(
                f"{name}: {part.name} has columns {sorted(part.columns)}, {first.name} has {sorted(columns)}"
            )
        for key, values in part.columns.items():
            columns[key].extend(values)
    starts = list(accumulate(map(len, parts), initial=0))

    def where(row: int) -> str:
        index = bisect_right(starts, row) - 1
        return f" ({parts[index].where(row - starts[index])})"

    is_text = formats.ending(Path(first.name)) == ".txt"
    settings = source.model_copy(update={"label_column": None}) if is_text else source
    declared = frozenset[str]().union(*(part.class_labels for part in parts))
    return _table(columns, settings, name, _stem(source.path), where, declared)


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def describe(config: DataConfig) -> Iterator[str]:
    """Lines on the files of a configuration: their rows, and fields that may have swallowed rows.

    Raises:
        DataError: As ``read``.
    """
    own = isinstance(config.partition, GivenPartition | RemotePartition)
    parts = {"proxy": config.proxy, "validation": config.validation, "test": config.test}
    parts |= {} if own else {"private": config.private}
    sources = {f"data.{part}.source": given.source for part, given in parts.items()}
    if None in sources.values():
        sources = {"data.source": config.source, **sources}
    if isinstance(config.partition, GivenPartition):
        clients = config.partition.sources.items()
        sources |= {f"data.partition.sources.{client}": source for client, source in clients}
    for name, source in sources.items():
        if isinstance(source, FileSource):
            yield from _describe(source, name)


def _describe(source: FileSource, name: str) -> Iterator[str]:
    parts = _parts(source, name)
    counts = ", ".join(f"{part.name} {len(part)}" for part in parts[:5])
    more = f", {len(parts) - 5} more files" if len(parts) > 5 else ""
    yield f"{name}: {sum(map(len, parts))} rows ({counts}{more})"
    for part in parts:
        if (joined := formats.joined_rows(part)) is not None:
            row, column, count = joined
            others = f", as {count - 1} more do" if count > 1 else ""
            yield (
                f"{name}: row {row} ({part.where(row)}) holds line breaks and delimiters in {column!r}"
                f"{others}: if a quotation mark is missing there, rows are lost"
            )


def _hub(source: HubSource, name: str) -> Table:
    loaded = hub.load(source.name, source.subset, source.split, source.revision, name)
    declared = hub.class_labels(loaded)
    return _table(hub.columns(loaded), source, name, Path(source.name).name, declared=declared)


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


def _table(
    columns: Mapping[str, Sequence[Any]],
    settings: Columns,
    name: str,
    stem: str,
    where: Where = nowhere,
    declared: frozenset[str] = frozenset(),
) -> Table:
    """Select and check the columns; every example must be complete, but for its label.

    Args:
        columns: The whole table.
        settings: Names of the columns to select.
        name: Its name in errors.
        stem: Beginning of the rows' ids.
        where: Places of the rows.
        declared: Columns that are a ``ClassLabel`` of ``datasets``.
    """

    def values(setting: str, key: str, *, required: bool = True) -> Sequence[Any]:
        column = find(columns, key)
        if column is None:
            raise DataError(f"{name}: {setting} = {key!r} is not a column; there are {known(columns)}")
        for row, value in enumerate(column):
            if value is not None and not isinstance(value, str | int | float):
                raise DataError(
                    f"{name}: row {row} has a {type(value).__name__} for {key!r}, not a text or "
                    f"number{where(row)}"
                )
            if required and is_missing(value):
                raise DataError(f"{name}: row {row} has no {key!r}{where(row)}")
            if isinstance(value, str) and not value.isascii() and _is_torn(value):
                raise DataError(
                    f"{name}: row {row} has half a character (a lone surrogate) in {key!r}{where(row)}"
                )
        return column

    def column(setting: str, key: str | None) -> tuple[str, ...] | None:
        return None if key is None else tuple(map(str, values(setting, key)))

    if (key := settings.messages_column) is not None:
        if (messages := find(columns, key)) is None:
            raise DataError(f"{name}: messages_column = {key!r} is not a column; there are {known(columns)}")
        texts = conversations(messages, key, name, where)
    else:
        texts = tuple(map(str, values("text_column", settings.text_column)))
    if not texts:
        raise DataError(f"{name}: no examples")
    beside = next((key for key in BESIDE if getattr(settings, key) is not None), None)
    others = None if beside is None else column(beside, getattr(settings, beside))
    prompts, answers = None, None
    if beside == "pair_column" and others is not None:
        prompts, texts = tuple(f"{first}\n" for first in texts), others
    elif beside == "prompt_column" and others is not None:
        prompts = tuple(f"{prompt}{settings.prompt_separator}" for prompt in others)
    elif others is not None:
        prompts = tuple(f"{question.strip()}\n" for question in others)
        if (right := find(columns, settings.answers_column)) is not None:
            answers = benchmark.answers(right, texts, name, where)
    if prompts is not None:
        texts = tuple(prompt + text for prompt, text in zip(prompts, texts, strict=True))
    labels, sources = None, None
    if (key := settings.label_column) is not None:
        labels = label_names(
            values("label_column", key, required=False), settings.no_label, key in declared, key, name, where
        )
    if (key := settings.source_column) is not None:
        sources = tuple(map(str, names(values("source_column", key), repr(key), name, where)))
    return Table(
        ids=tuple(f"{stem}/{row}" for row in range(len(texts))),
        texts=texts,
        labels=labels,
        sources=sources,
        starts=None if prompts is None else tuple(map(len, prompts)),
        beside=beside,
        answers=answers,
        where=where,
        conversations=settings.messages_column is not None,
    )
