"""Read benchmarks: check columns, fill templates, join WikiText's lines, parse SQuAD's answers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feddistill.config.presets import Preset
from feddistill.data import hub
from feddistill.data.columns import Where, is_missing, nowhere
from feddistill.errors import DataError
from feddistill.types import Span

Columns = dict[str, list[Any]]

NO_ANSWERS: dict[str, list[Any]] = {"text": [], "answer_start": []}

PAGE = re.compile(r"\s*= [^=](.*[^=])? =\s*")
"""A line with a heading of the first order."""


def read(preset: Preset, split: str, path: Path | None, revision: str | None, name: str) -> Columns:
    """Load the columns of a benchmark's split.

    Args:
        preset: The benchmark.
        split: One of its splits.
        path: A local folder in the hub's layout; ``None`` for the hub.
        revision: A commit of the hub's data set.
        name: Its name in errors.

    Raises:
        DataError: It cannot be loaded (the message names the option for a local copy), or has other columns.
    """
    if path is not None and not path.is_dir():
        raise DataError(f"{name}: no such folder: {path}")
    place = preset.hub if path is None else str(path)
    try:
        loaded = hub.load(place, preset.subset, split, revision, name)
    except DataError as error:
        hint = "" if path else "; a local copy in the hub's layout is named by --path (in data.source: path)"
        raise DataError(f"{error}{hint}") from None
    columns = hub.columns(loaded)
    names = (*preset.columns, *(() if preset.kind == "language" else (preset.label_column,)))
    for column in names:
        if column not in columns:
            raise DataError(f"{name}: {place} has no column {column!r}, which {preset.name} has")
    if not columns[names[0]]:
        raise DataError(f"{name}: {place} has no examples in {split}")
    for column in preset.columns:
        for row, value in enumerate(columns[column]):
            if not isinstance(value, str):
                raise DataError(f"{name}: row {row} of {place} has no text in {column!r}")
    return columns


def texts(preset: Preset, columns: Columns) -> tuple[str, ...]:
    """A classifier's inputs, one per row."""
    return tuple(preset.text.format(**row) for row in rows(preset, columns))


def rows(preset: Preset, columns: Columns) -> list[dict[str, str]]:
    """The values of the benchmark's templates, one mapping per row."""
    parts = [[value.strip() for value in columns[name]] for name in preset.columns]
    return [dict(zip(preset.columns, row, strict=True)) for row in zip(*parts, strict=True)]


def labels(preset: Preset, columns: Columns, name: str) -> tuple[str, ...]:
    """The names of the labels; files contain numbers or names.

    Raises:
        DataError: A row has no label, or one that the benchmark does not have.
    """
    named = []
    for row, value in enumerate(columns[preset.label_column]):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(preset.labels):
            named.append(preset.labels[value])
        elif value in preset.labels:
            named.append(value)
        elif is_missing(value) or value == -1:
            raise DataError(f"{name}: row {row} has no label")
        else:
            known = ", ".join(preset.labels)
            raise DataError(f"{name}: row {row} has label {value!r}, which is not one of {known}")
    return tuple(named)


def golds(columns: Columns, name: str, where: Where = nowhere) -> tuple[tuple[str, ...], ...]:
    """SQuAD's answers to each question; empty if it has no answer."""
    answers = []
    for row, value in enumerate(columns["answers"]):
        given = value.get("text") if isinstance(value, Mapping) else None
        if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
            raise DataError(
                f"{name}: row {row} has no 'answers' in SQuAD's form, lists of text and answer_start"
                f"{where(row)}"
            )
        answers.append(tuple(given))
    return tuple(answers)


def answers(
    values: Sequence[Any], passages: Sequence[str], name: str, where: Where = nowhere
) -> tuple[tuple[Span, ...] | None, ...]:
    """SQuAD's answers as spans of their passages; ``None`` where the value is missing.

    Raises:
        DataError: A row is not in SQuAD's form, or an answer is not at its ``answer_start``.

    >>> answers([{"text": ["cat"], "answer_start": [4]}], ["The cat sat."], "data.source")
    (((4, 7),),)
    """
    spans: list[tuple[Span, ...] | None] = []
    given = [NO_ANSWERS if _is_null(value) else _listed(value) for value in values]
    texts = golds({"answers": given}, name, where)
    for row, (right, passage) in enumerate(zip(texts, passages, strict=True)):
        if _is_null(values[row]):
            spans.append(None)
            continue
        starts = given[row].get("answer_start")
        if not isinstance(starts, list) or len(starts) != len(right):
            raise DataError(
                f"{name}: row {row} has {len(right)} answers, and not as many answer_start{where(row)}"
            )
        for text, start in zip(right, starts, strict=True):
            present = isinstance(start, int) and start >= 0 and passage[start : start + len(text)] == text
            if not present or not text.strip():
                raise DataError(
                    f"{name}: row {row}: its answer {text!r} is not at character {start}{where(row)}"
                )
        spans.append(tuple((start, start + len(text)) for text, start in zip(right, starts, strict=True)))
    return tuple(spans)


def _is_null(value: Any) -> bool:
    """True for a missing mapping, which ``datasets`` may give as one of missing values."""
    return value is None or (
        isinstance(value, Mapping) and bool(value) and all(part is None for part in value.values())
    )


def _listed(value: Any) -> Any:
    """The mapping with lists instead of the arrays of parquet files."""
    if not isinstance(value, Mapping):
        return {}
    return {key: part.tolist() if hasattr(part, "tolist") else part for key, part in value.items()}


def pages(lines: Sequence[str]) -> list[str]:
    """Join WikiText's lines to articles.

    An article begins with a heading of the first order between empty lines.

    >>> pages(["", " = One = \\n", "", " Text . \\n", " = = Part = = \\n", "", " = Two = \\n", ""])
    [' = One = \\n Text . \\n = = Part = = \\n', ' = Two = \\n']
    """
    articles: list[list[str]] = []
    for index, line in enumerate(lines):
        alone = all(not lines[near].strip() for near in (index - 1, index + 1) if 0 <= near < len(lines))
        if not articles or (alone and PAGE.fullmatch(line)):
            articles.append([])
        articles[-1].append(line if line.endswith("\n") or not line else line + "\n")
    return [page for parts in articles if (page := "".join(parts)).strip()]


def detokenise(page: str) -> str:
    """Convert WikiText's tokens back to text, as Megatron-LM's ``wikitext_detokenizer`` does.

    >>> detokenise(' = Title = \\n In 1 @,@ 024 cases ( or so ) , it \\'s " well @-@ known " . \\n')
    ' = Title =\\nIn 1,024 cases (or so), it\\'s "well-known".\\n'
    """
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, plain)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    text = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for mark, plain in (("= = = =", "===="), ("= = =", "==="), ("= =", "==")):
        text = text.replace(mark, plain)
    text = text.replace(f" {chr(176)} ", chr(176)).replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")
