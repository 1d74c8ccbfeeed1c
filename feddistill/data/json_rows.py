"""Rows of JSON: lists of objects, columns, and SQuAD's own form."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any


def loads(text: str) -> Any:
    """The value of a JSON text; a key that stands twice in an object is a ``ValueError``."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"an object has {max(names, key=names.count)!r} twice")
    return values


def columns(text: str) -> dict[str, list[Any]]:
    """The columns of a list of objects, an object of columns, or an object with such a list as ``data``.

    Raises:
        ValueError: It is none of these, or not JSON.
    """
    content = loads(text)
    if isinstance(content, dict):
        rows = content.get("data")
        others = [value for key, value in content.items() if key != "data"]
        if not isinstance(rows, list) or not rows or any(isinstance(value, list) for value in others):
            return _columns(content)
        if not all(isinstance(row, dict) for row in rows):
            return _columns(content)
        return objects(_squad(rows) if any("paragraphs" in row for row in rows) else rows)
    if not isinstance(content, list):
        raise ValueError("it is no list of objects")
    return objects(content)


def _columns(content: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Columns as lists, or as objects by row (as pandas writes them); a single value is that of every row."""
    lists = {key: value for key, value in content.items() if isinstance(value, list | dict)}
    rows = [list(values) if isinstance(values, dict) else range(len(values)) for values in lists.values()]
    if any(list(keys) != list(rows[0]) for keys in rows):
        raise ValueError(f"its columns ({', '.join(lists)}) have different rows")
    count = len(rows[0]) if rows else 0
    whole = {key: content[key] if key in lists else [content[key]] * count for key in content}
    return {key: list(v.values()) if isinstance(v, dict) else v for key, v in whole.items()}


def objects(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Columns of JSON objects; missing keys are ``None``.

    Raises:
        ValueError: A row is no object.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    keys = dict.fromkeys(chain.from_iterable(rows))
    return {key: [row.get(key) for row in rows] for key in keys}


def _squad(articles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The questions of SQuAD's own JSON, one row each."""
    rows = []
    for number, article in enumerate(articles):
        for place, paragraph in enumerate(_list(article, "paragraphs", f"article {number}")):
            name = f"article {number}, paragraph {place}"
            for asked in _list(paragraph, "qas", name):
                if not isinstance(asked, dict):
                    raise ValueError(f"{name} has a question that is no object")
                row = {"title": article.get("title"), "context": paragraph.get("context")}
                row |= {key: value for key, value in asked.items() if key != "answers"}
                if "answers" in asked:
                    answers = _list(asked, "answers", name)
                    if not all(isinstance(answer, dict) for answer in answers):
                        raise ValueError(f"{name} has an answer that is no object")
                    row["answers"] = {
                        key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")
                    }
                rows.append(row)
    return rows


def _list(value: Any, key: str, name: str) -> list[Any]:
    part = value.get(key) if isinstance(value, dict) else None
    if not isinstance(part, list):
        raise ValueError(f"{name} has no list of {key}")
    return part
