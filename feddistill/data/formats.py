"""Read one local file into columns: csv, tsv, jsonl, json, parquet or txt, in any encoding, also gzipped."""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from feddistill.config.data import FileSource
from feddistill.data import json_rows
from feddistill.errors import DataError

Columns = dict[str, list[Any]]

TEXT_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
}
"""Format of a text file by its ending, to which ``.gz`` may be added."""

ENDINGS = (*TEXT_FORMATS, ".parquet")

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16: it begins with that mark
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks, and the encodings of files that begin with them."""


@dataclass(frozen=True, slots=True)
class File:
    """The rows of a file."""

    name: str
    columns: Columns
    lines: Sequence[int] | None = None
    """First line of each row, from 1; ``None`` if rows are no lines."""
    class_labels: frozenset[str] = frozenset()
    """Columns that the file declares as ``ClassLabel`` of ``datasets``."""
    delimiter: str | None = None
    """What separates the columns, if fields may be quoted."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, row: int) -> str:
        """The file and the line (without lines, the row) of a row."""
        return f"{self.name}, row {row}" if self.lines is None else f"{self.name}, line {self.lines[row]}"


def ending(path: Path) -> str | None:
    """The ending of a readable file without ``.gz``; ``None`` for other files."""
    name = PurePath(path.name.lower())
    if name.suffix == ".gz":
        return stem.suffix if (stem := name.with_suffix("")).suffix in TEXT_FORMATS else None
    return name.suffix if name.suffix in ENDINGS else None


def readable() -> str:
    """The endings of readable files, for errors."""
    return f"{', '.join(ENDINGS)} (but for parquet also .gz)"


def read(path: Path, source: FileSource, name: str) -> File:
    """Read a file; ``name`` is the source's name in errors.

    Raises:
        DataError: It cannot be read, is malformed, or a setting of ``source`` is not for its format.
    """
    kind = ending(path)
    if kind is None:
        raise DataError(f"{name}: {path} ends in {path.suffix!r}; readable are {readable()}")
    if TEXT_FORMATS.get(kind) != "csv" and (source.delimiter is not None or source.quoting is not None):
        setting = "delimiter" if source.delimiter is not None else "quoting"
        raise DataError(f"{name}: {setting} is for csv and tsv, not for {path.name}")
    if kind == ".parquet" and source.encoding is not None:
        raise DataError(f"{name}: encoding is for text files, not for {path.name}")
    try:
        if kind == ".parquet":
            return _parquet(path)
        packed = path.read_bytes()
        content = gzip.decompress(packed) if path.suffix.lower() == ".gz" else packed
        text = decode(content, source.encoding)
        match TEXT_FORMATS[kind]:
            case "csv":
                return _separated(path.name, text, source.delimiter or _delimiter(kind), source.quoting)
            case "jsonl":
                return _json_lines(path.name, text)
            case "json":
                return File(path.name, json_rows.columns(text))
            case _:
                numbers, lines = _lines(text)
                return File(path.name, {source.text_column: lines}, numbers)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: {path} is malformed: {error}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise DataError(f"{name}: {path} is malformed: its values are nested too deeply") from None
    except (ValueError, TypeError) as error:  # parsers' own
        raise DataError(f"{name}: {path} is malformed: {' '.join(str(error).split())}") from None


def decode(content: bytes, encoding: str | None) -> str:
    """Decode a file without its byte order marks.

    Args:
        content: The file's bytes.
        encoding: Python's name; ``None`` for what the mark at the beginning says, else UTF-8.

    Raises:
        ValueError: The bytes are not of this encoding.

    >>> decode("a\\n".encode("utf-16"), None), decode("Zoë".encode("latin-1"), "latin-1")
    ('a\\n', 'Zoë')
    """
    mark, marked = next(((mark, of) for mark, of in MARKS if content.startswith(mark)), (b"", None))
    given = None if encoding is None else codecs.lookup(encoding).name.removesuffix("-sig")
    if marked is not None and given is not None and not f"{marked}-".startswith(f"{given}-"):
        raise ValueError(f"it begins with a byte order mark of {marked}, but encoding is {encoding}")
    used = marked or given or "utf-8"
    try:
        text = content[len(mark) :].decode(used)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        line = content.count(b"\n", 0, at) + 1
        hint = "; name the file's own encoding, as in encoding: latin-1" if encoding is None else ""
        raise ValueError(f"byte {content[at]:#04x} in line {line} is not {used}{hint}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"a NUL character in line {line}: is it in another encoding, as encoding: utf-16-le?"
        )
    # Files that were joined have marks at the beginnings of lines.
    return text.lstrip("\ufeff").replace("\n\ufeff", "\n") if "\ufeff" in text else text


def _delimiter(kind: str) -> str:
    return "\t" if kind == ".tsv" else ","


def _lines(text: str) -> tuple[list[int], list[str]]:
    """Numbers and contents of the lines that are not blank."""
    # Not splitlines, which also splits at form feeds and U+2028.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    kept = [number for number, line in enumerate(lines, 1) if line.strip()]
    return kept, [lines[number - 1] for number in kept]


def _separated(name: str, text: str, delimiter: str, quoting: str | None) -> File:
    """Read csv or tsv; fields are quoted only with ``standard``, the default unless tabs separate them."""
    quoted = quoting == "standard" or (quoting is None and delimiter != "\t")
    rows, numbers = _records(text, delimiter, quoted)
    if not rows:
        return File(name, {})
    header, *rows = rows
    named = [column for column in header if column]  # a header may end in a delimiter
    if twice := [column for place, column in enumerate(named) if column in named[:place]]:
        raise ValueError(f"the header has the column {twice[0]!r} twice")
    for row, fields in enumerate(rows):
        if len(fields) != len(header):
            hint = (
                "rows have more fields than the header" if len(fields) > len(header) else "fields are missing"
            )
            advice = (
                f"quote texts that hold {delimiter!r}" if quoted else "quoting: standard reads quoted texts"
            )
            raise ValueError(
                f"{hint} (row {row}, line {numbers[row + 1]}: {len(fields)}, not {len(header)}); {advice}"
            )
    values = dict(zip(header, zip(*rows, strict=True), strict=False)) if rows else dict.fromkeys(header, ())
    columns = {column: list(values[column]) for column in named}
    return File(name, columns, numbers[1:], delimiter=delimiter if quoted else None)


def _records(text: str, delimiter: str, quoted: bool) -> tuple[list[list[str]], list[int]]:
    """The records that are not blank, and the line in which each begins."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    rows, numbers = [], []
    line = 1
    try:
        for fields in reader:
            if len(fields) > 1 or (fields and fields[0].strip()):
                rows.append(fields)
                numbers.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        which = f"row {len(rows) - 1}" if rows else "the header"
        raise ValueError(
            f"{which} (lines {line} to {reader.line_num}): {error}; a field that begins with a "
            "quotation mark ends with one, and marks in it are doubled (quoting: none: marks are text)"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows, numbers


def joined_rows(file: File) -> tuple[int, str, int] | None:
    """The first row with a field that holds line breaks and delimiters, its column, and how many there are.

    Such a field is valid, and also what a forgotten quotation mark makes of the rows that follow it.
    """
    if file.delimiter is None:
        return None
    found = [
        (row, column)
        for column, values in file.columns.items()
        for row, value in enumerate(values)
        if file.delimiter in value and ("\n" in value or "\r" in value)
    ]
    return (*min(found, key=lambda place: place[0]), len({row for row, _ in found})) if found else None


def _json_lines(name: str, text: str) -> File:
    numbers, lines = _lines(text)
    rows = []
    for number, line in zip(numbers, lines, strict=True):
        try:
            rows.append(json_rows.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"object {len(rows) + 1}: {error.msg} at its character {error.pos + 1} (line {number})"
            ) from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return File(name, json_rows.objects(rows), numbers)


def _parquet(path: Path) -> File:
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as opened:
            table = opened.read()
        names = [name for name in table.column_names if not name.startswith("__index_level_")]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(f"it has the column {twice[0]!r} twice")
        columns = {name: table.column(name).to_pylist() for name in names}
        for name in names:
            if table.schema.field(name).type in (pyarrow.float16(), pyarrow.float32()):
                # As written: 0.1, not the nearest float64 of a float32.
                columns[name] = [None if v is None else float(str(np.float32(v))) for v in columns[name]]
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    return File(path.name, columns, class_labels=_class_labels(table.schema.metadata or {}))


def _class_labels(metadata: Mapping[bytes, bytes]) -> frozenset[str]:
    """The columns that ``datasets`` declared as ``ClassLabel`` in a parquet file's metadata."""
    written = json.loads(metadata.get(b"huggingface", b"{}"))
    features = written.get("info", {}).get("features", {}) if isinstance(written, dict) else {}
    return frozenset(
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    )
