"""Load the data of a run: private texts of the clients, proxy, validation and test set."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from feddistill.config.data import DataConfig, GivenPartition, Part, RemotePartition, Source
from feddistill.config.tasks import TASKS, tasks_with
from feddistill.data.partition import partition
from feddistill.data.sources import Table, read
from feddistill.errors import ConfigError, DataError
from feddistill.seeds import generator
from feddistill.types import UNLABELLED, Span, Splits, TextSet

SHARED = ("test", "validation", "proxy")
PARTS = (*SHARED, "private")
BESIDE = {"tokens": "prompt_column", "answer": "question_column"}
"""Setting of the text before each text, by the kind of labels."""


def load(config: DataConfig, seed: int, task: str = "classification") -> Splits:
    """Read, label, split and divide; the same seed gives the same result on every machine.

    Args:
        config: Settings of the data.
        seed: For everything that is drawn.
        task: Decides what labels texts must have.

    Raises:
        DataError: A file, a column, a label or a client's data is missing or does not fit the rest.
        ConfigError: A set has neither its own source nor ``data.source``.
    """
    own_texts = isinstance(config.partition, GivenPartition | RemotePartition)
    parts: dict[str, Part] = {name: getattr(config, name) for name in (SHARED if own_texts else PARTS)}
    carved = [name for name, part in parts.items() if part.source is None]
    pool = read(config.source, "data.source") if config.source is not None and carved else None
    if carved and pool is None:
        raise ConfigError(f"data.{carved[0]}.source is missing, and there is no data.source to draw it from")
    tables = {
        name: read(part.source, f"data.{name}.source")
        for name, part in parts.items()
        if part.source is not None
    }
    clients: dict[str, Table] = {}
    if isinstance(config.partition, GivenPartition):
        clients = {
            name: read(source, f"data.partition.sources.{name}")
            for name, source in config.partition.sources.items()
        }
    every = {"data.source": pool, **{f"data.{name}": table for name, table in tables.items()}, **clients}
    there = {name: table for name, table in every.items() if table is not None}
    for name, table in there.items():
        _check_columns(table, name, task)
        if TASKS[task].labels == "answer":
            _check_questions(table, name, task, answers=name != "data.proxy")
    if TASKS[task].labels == "class":
        check_pairs({name: table.starts for name, table in there.items()})
    # Without a common source the test set defines the classes: a client whose labels are spelt differently
    # is an error, not one more class.
    classes = TASKS[task].labels == "class"
    labels = config.labels or _labels(pool or tables["test"], classes)
    sets: dict[str, TextSet] = {}
    if pool is not None:
        whole = _labelled(pool, labels, "data.source", optional=not classes)
        for name, rows in _carve(len(whole), {n: parts[n].size for n in carved}, seed).items():
            sets[name] = whole.select(rows, f"data.{name}")
    for name, table in tables.items():
        unread = name == "proxy" and not config.proxy.labelled  # its classes may be others
        whole = _labelled(
            replace(table, labels=None) if unread else table,
            labels,
            f"data.{name}",
            optional=name == "proxy" or not classes,
            partly=name == "proxy",
        )
        sets[name] = _draw(whole, parts[name].size, seed)
    if isinstance(config.partition, GivenPartition):
        private = tuple(
            _labelled(table, labels, name, optional=not classes) for name, table in clients.items()
        )
    elif isinstance(config.partition, RemotePartition):
        nothing = np.zeros(0, np.int64)
        private = tuple(TextSet(name, (), (), nothing, labels) for name in config.partition.names)
    else:
        private = partition(sets["private"], config.partition, seed)
    if not isinstance(config.partition, RemotePartition):
        _every_client_has_texts(private)
        if classes:
            _every_class_has_a_teacher(private, labels)
    places = _present(private, config.exclude_clients)
    return Splits(
        private=tuple(private[place] for place in places),
        proxy=_hide_labels(sets["proxy"], config.proxy.labelled, seed),
        validation=sets["validation"],
        test=sets["test"],
        places=places,
    )


def labelled(source: Source, labels: tuple[str, ...], name: str, task: str = "classification") -> TextSet:
    """Texts of ``source`` with the labels that the task needs; ``name`` is its name in errors."""
    if TASKS[task].labels == "class":
        table = read(source, name)
        _check_columns(table, name, task)
        return _labelled(table, labels, name, optional=False)
    table = read(source.model_copy(update={"label_column": None}), name)
    _check_columns(table, name, task)
    if TASKS[task].labels == "answer":
        _check_questions(table, name, task, answers=True)
    return _labelled(table, labels, name, optional=True)


def lines(texts: TextSet) -> Iterator[bytes]:
    """The proxy set as JSON lines of ids and texts, as clients receive it."""
    for row, (i, text) in enumerate(zip(texts.ids, texts.texts, strict=True)):
        more: dict[str, object] = {} if texts.starts is None else {"start": texts.starts[row]}
        more |= {} if texts.turns is None else {"turns": texts.turns[row]}
        yield (
            json.dumps({"id": i, "text": text, **more}, ensure_ascii=False, separators=(",", ":")).encode()
            + b"\n"
        )


def _labels(table: Table, classes: bool) -> tuple[str, ...]:
    names = {label for label in table.labels or () if label is not None}
    if classes and len(names) < 2:
        raise DataError(f"data: classification needs at least two labels, found {sorted(names)}")
    return tuple(sorted(names))


def _labelled(
    table: Table, labels: tuple[str, ...], name: str, *, optional: bool, partly: bool = False
) -> TextSet:
    """Replace label names by indices; a label that is not in ``labels`` is an error.

    Without ``optional`` the table must have labels, and without ``partly`` all of its rows.
    """
    index: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    if partly:
        index[None] = UNLABELLED
    if table.labels is None:
        if not optional:
            raise DataError(f"{name}: {table.unlabelled}")
        numbers = np.full(len(table.texts), UNLABELLED, np.int64)
    else:
        for row, label in enumerate(table.labels):
            if label not in index:
                if label is None:
                    raise DataError(
                        f"{name}: row {row} has no label{table.where(row)}; only data.proxy may have such "
                        "rows, from a source of its own"
                    )
                raise DataError(
                    f"{name}: row {row} has label {label!r}, which is not one of {', '.join(labels)}"
                    f"{table.where(row)}; name all classes in data.labels, or mend the file"
                )
        numbers = np.array([index[label] for label in table.labels], np.int64)
    answers: tuple[tuple[Span, ...] | None, ...] | None = table.answers
    if answers is not None and not partly and None in answers:
        row = answers.index(None)
        raise DataError(
            f"{name}: row {row} has no answers{table.where(row)}; only data.proxy may have such rows, from a "
            "source of its own"
        )
    if table.questions and answers is None:
        answers = (None,) * len(table.texts)
    return TextSet(
        name,
        table.ids,
        table.texts,
        numbers,
        labels,
        table.sources,
        table.starts,
        answers,
        conversations=table.conversations,
    )


def check_pairs(starts: Mapping[str, tuple[int, ...] | None]) -> None:
    """Check that of sets for classification all have pairs of texts, or none.

    Args:
        starts: ``TextSet.starts`` by the name of the set.

    Raises:
        DataError: Some have pairs and some have not.
    """
    pairs = [name for name, given in starts.items() if given is not None]
    plain = [name for name, given in starts.items() if given is None]
    if pairs and plain:
        raise DataError(f"{pairs[0]} has pairs of texts (pair_column), and {plain[0]} has not")


def _check_columns(table: Table, name: str, task: str) -> None:
    """Check that the task reads what stands beside each text, and conversations if texts are."""
    if table.conversations and TASKS[task].labels != "tokens":
        raise DataError(
            f"{name}: messages_column is for {tasks_with(labels='tokens')}, not for task = {task}"
        )
    if TASKS[task].labels == "class":
        if table.beside not in (None, "pair_column"):
            raise DataError(
                f"{name}: {table.beside} is not for task = {task}: pair_column names a second text of each "
                "example"
            )
    elif table.beside == "pair_column":
        raise DataError(
            f"{name}: pair_column is for {tasks_with(labels='class')}, not for task = {task}: "
            f"{BESIDE[TASKS[task].labels]} names a text before each text"
        )


def _check_questions(table: Table, name: str, task: str, *, answers: bool) -> None:
    """Check that texts are questions on passages, with ``answers`` if required."""
    if not table.questions:
        raise DataError(f"{name}: task = {task} needs questions; question_column names their column")
    if answers and table.answers is None:
        raise DataError(f"{name}: has no column of answers; answers_column names it")


def _carve(examples: int, sizes: dict[str, int | None], seed: int) -> dict[str, NDArray[np.int64]]:
    """Disjoint random rows for each set; one set may take all that is left."""
    rest = [name for name, size in sizes.items() if size is None]
    if len(rest) > 1:
        raise ConfigError(f"only one part can take the rest of data.source: give data.{rest[0]}.size")
    needed = sum(size for size in sizes.values() if size is not None) + len(rest)
    if needed > examples:
        parts = ", ".join(f"{name} {size or 1}" for name, size in sizes.items())
        raise DataError(f"data.source has {examples} examples, the parts need {needed} ({parts})")
    order = generator(seed, "carve").permutation(examples)
    carved, start = {}, 0
    for name in sorted(sizes, key=lambda n: sizes[n] is None):  # the one without a size last
        size = sizes[name]
        stop = examples if size is None else start + size
        carved[name], start = order[start:stop], stop
    return carved


def _draw(whole: TextSet, size: int | None, seed: int) -> TextSet:
    if size is None:
        return whole
    if size > len(whole):
        raise DataError(f"{whole.name}.size = {size}, but its source has {len(whole)} examples")
    return whole.select(generator(seed, "draw", whole.name).permutation(len(whole))[:size])


def _hide_labels(proxy: TextSet, labelled: int | Literal["all"], seed: int) -> TextSet:
    """Drop all labels but ``labelled`` of them, drawn at random."""
    known = np.flatnonzero(proxy.known)
    if labelled == "all":
        labelled = len(known)
        if not labelled:
            raise DataError("data.proxy.labelled = all, but no proxy text has a label")
    if labelled > len(known):
        raise DataError(f"data.proxy.labelled = {labelled}, but {len(known)} proxy texts have a label")
    kept = generator(seed, "proxy", "labelled").permutation(known)[:labelled]
    labels = np.full(len(proxy), UNLABELLED, np.int64)
    labels[kept] = proxy.labels[kept]
    answers = proxy.answers
    if answers is not None:
        shown = set(kept.tolist())
        answers = tuple(right if row in shown else None for row, right in enumerate(answers))
    return replace(proxy, name="data.proxy", labels=labels, answers=answers)


def _present(private: tuple[TextSet, ...], absent: tuple[str, ...]) -> tuple[int, ...]:
    names = [client.name for client in private]
    if unknown := sorted(set(absent) - set(names)):
        raise ConfigError(
            f"data.exclude_clients names {', '.join(unknown)}; the clients are {', '.join(names)}"
        )
    places = tuple(place for place, name in enumerate(names) if name not in absent)
    if not places:
        raise ConfigError("data.exclude_clients names every client")
    return places


def _every_client_has_texts(private: tuple[TextSet, ...]) -> None:
    for client in private:
        if not len(client):
            raise DataError(f"{client.name} has no private examples")


def _every_class_has_a_teacher(private: tuple[TextSet, ...], labels: tuple[str, ...]) -> None:
    totals = np.sum([client.label_counts() for client in private], axis=0)
    for label, total in zip(labels, totals, strict=True):
        if total == 0:
            raise DataError(
                f"class {label!r} has no private example at any client; "
                "leave it out of data.labels, and its texts out of the other sets"
            )
