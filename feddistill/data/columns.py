"""Find columns in a table, also inside nested ones, and name labels and sources."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from feddistill.errors import DataError

PART = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
"""A step into a nested column: ``.name`` or ``[0]``."""

NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d*)?")
"""A number without an exponent; ``007`` is a code."""

Where = Callable[[int], str]
"""The place of a row as a suffix of an error: `` (a.csv, line 3)``."""


def nowhere(row: int) -> str:
    """The ``Where`` of rows without a file."""
    return ""


def find(columns: Mapping[str, Sequence[Any]], key: str) -> Sequence[Any] | None:
    """The column ``key``, or what is at this path in a nested one; ``None`` if there is neither.

    >>> find({"answers": [{"text": ["a", "b"]}, {"text": []}]}, "answers.text[0]")
    ['a', None]
    """
    if key in columns:
        return columns[key]
    outer = [name for name in columns if key.startswith((f"{name}.", f"{name}["))]
    if not outer:
        return None
    name = max(outer, key=len)
    steps = [(part[1], part[2]) for part in PART.finditer(key, len(name))]
    if "".join(f".{field}" if field else f"[{index}]" for field, index in steps) != key[len(name) :]:
        return None
    values = [_inside(value, steps) for value in columns[name]]
    return None if all(value is None for value in values) else values


def _inside(value: Any, steps: Sequence[tuple[str | None, str | None]]) -> Any:
    for field, index in steps:
        if field is not None:
            value = value.get(field) if isinstance(value, Mapping) else None
        else:
            place = int(index or 0)
            value = value[place] if isinstance(value, list | tuple) and place < len(value) else None
    return value


def known(columns: Mapping[str, Sequence[Any]]) -> str:
    """The names of all columns, for errors."""
    names = []
    for name, values in columns.items():
        inside = next((value for value in values if isinstance(value, Mapping) and value), None)
        names += [name] if inside is None else [f"{name}.{key}" for key in inside]
    return ", ".join(map(repr, names)) or "none"


def conversations(values: Sequence[Any], key: str, name: str, where: Where) -> tuple[str, ...]:
    """Conversations, each as JSON; keys of messages that are null are left out.

    Raises:
        DataError: A row is no list of messages with ``role`` and ``content``.
    """
    found = []
    for row, messages in enumerate(values):
        if not isinstance(messages, list | tuple) or not messages:
            raise DataError(
                f"{name}: row {row} has no list of messages {{role, content}} in {key!r}{where(row)}"
            )
        kept = []
        for number, message in enumerate(messages):
            for part in ("role", "content"):
                if not isinstance(message, Mapping) or not isinstance(message.get(part), str):
                    raise DataError(
                        f"{name}: row {row} has a message {number} without a text for {part!r} in "
                        f"{key!r}{where(row)}"
                    )
            kept.append({part: value for part, value in message.items() if value is not None})
        text = json.dumps(kept, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{name}: row {row} has half a character (a lone surrogate) in {key!r}{where(row)}"
            ) from None
        found.append(text)
    return tuple(found)


def is_missing(value: Any) -> bool:
    """True for null, NaN and blank text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def written(value: Any) -> str:
    """The name of a value: that of a whole number is the same whatever its type.

    >>> written(2), written(2.0), written(2.5), written(True), written("2.0")
    ('2', '2', '2.5', 'True', '2.0')
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def names(values: Sequence[Any], setting: str, name: str, where: Where) -> list[str | None]:
    """The names of labels or sources, ``None`` for missing ones; equal numbers have equal names.

    Raises:
        DataError: Some values are true or false and others are not, or a name begins with a byte order mark.
    """
    given = [(row, value) for row, value in enumerate(values) if not is_missing(value)]
    if given and len({isinstance(value, bool) for _, value in given}) > 1:
        other, first = given[0]
        row, value = next(pair for pair in given if isinstance(pair[1], bool) != isinstance(first, bool))
        raise DataError(
            f"{name}: row {row} has {value!r} for {setting}{where(row)}, and row {other} has {first!r}"
            f"{where(other)}: true and false stand beside other values"
        )
    found: list[str | None] = [None] * len(values)
    for row, value in given:
        found[row] = text = written(value)
        if "\ufeff" in text:
            raise DataError(f"{name}: row {row} has a byte order mark in {setting}{where(row)}")
    return _alike(found, setting, name, where)


def _alike(found: list[str | None], setting: str, name: str, where: Where) -> list[str | None]:
    """The names with whole numbers as ``1``, also where files without types have ``1.0``.

    Names beside which there are others than numbers are left as they are, and checked.
    """
    numbers = {text: NUMBER.fullmatch(text) for text in dict.fromkeys(found) if text is not None}
    if all(numbers.values()):
        alike = {text: written(float(text)) if "." in text else text for text in numbers}
        return [None if text is None else alike[text] for text in found]
    first: dict[float, str] = {}
    for text in (text for text, match in numbers.items() if match):
        same = first.setdefault(float(text), text)
        if same != text:
            row, other = found.index(text), found.index(same)
            raise DataError(
                f"{name}: row {row} has {text!r} for {setting}{where(row)}, and row {other} has {same!r}"
                f"{where(other)}: write them alike"
            )
    return found


def labels(
    values: Sequence[Any],
    no_label: int | str | None,
    is_class: bool,
    setting: str,
    name: str,
    where: Where,
) -> tuple[str | None, ...]:
    """The names of labels; ``None`` for rows without a label.

    Args:
        values: Labels as they are in the file.
        no_label: The setting.
        is_class: True for a ``ClassLabel`` of ``datasets``, in which -1 is no label.
        setting: The column as the user wrote it, for errors.
        name: The source's name in errors.
        where: Places of rows.

    Raises:
        DataError: As ``names``, or -1 may be a class and may be no label.
    """
    if is_class:
        found = [None if is_missing(value) or value == -1 else str(value) for value in values]
    else:
        found = names(values, setting, name, where)
        if no_label is None and "-1" in found:
            row = found.index("-1")
            raise DataError(
                f"{name}: row {row} has -1 for {setting}{where(row)}: set no_label: -1 if that is no label, "
                "no_label: false if it is a class"
            )
    missing = None if no_label is None or no_label is False else str(no_label)
    return tuple(None if text == missing else text for text in found)
