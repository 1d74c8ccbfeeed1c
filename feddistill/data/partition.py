"""Divide a pool of private texts among clients."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO

import numpy as np
from numpy.typing import NDArray

from feddistill.config.data import (
    BySourcePartition,
    DirichletPartition,
    IidPartition,
    QuantityPartition,
)
from feddistill.errors import DataError
from feddistill.seeds import generator
from feddistill.types import TextSet

DRAWS = 1000
"""Draws of a partition until each client has enough."""


def partition(
    pool: TextSet,
    how: IidPartition | DirichletPartition | BySourcePartition | QuantityPartition,
    seed: int,
) -> tuple[TextSet, ...]:
    """Assign every example of ``pool`` to exactly one client; clients are numbered in order.

    Raises:
        DataError: There are fewer examples than the clients need, or no source column to divide by.
    """
    from datasets import Dataset
    from flwr_datasets import partitioner as flwr

    shuffled = pool.select(generator(seed, "partition", "order").permutation(len(pool)))
    columns: dict[str, object] = {"row": np.arange(len(pool)), "label": shuffled.labels}
    names: list[str] | None = None
    match how:
        case IidPartition():
            _enough(pool, how.clients)
            divide = flwr.IidPartitioner(how.clients)
        case DirichletPartition():
            parts = _by_label(shuffled.labels, how, seed)
            return tuple(shuffled.select(rows, name=f"client-{i}") for i, rows in enumerate(parts))
        case BySourcePartition():
            if shuffled.sources is None:
                raise DataError("data.partition by_source needs data.source.source_column")
            columns["source"] = list(shuffled.sources)
            divide = flwr.NaturalIdPartitioner(partition_by="source")
        case QuantityPartition():
            divide = flwr.SizePartitioner(_sizes(len(pool), how, seed))
    divide.dataset = Dataset.from_dict(columns)
    with redirect_stderr(StringIO()):  # flwr_datasets prints progress there
        parts = [np.sort(np.asarray(divide.load_partition(i)["row"])) for i in range(divide.num_partitions)]
    if isinstance(how, BySourcePartition):
        names = client_names([str(divide.partition_id_to_natural_id[i]) for i in range(len(parts))])
    return tuple(
        shuffled.select(rows, name=names[i] if names else f"client-{i}") for i, rows in enumerate(parts)
    )


def _by_label(labels: NDArray[np.int64], how: DirichletPartition, seed: int) -> list[NDArray[np.int64]]:
    """Rows of each client: of each class, multinomial counts with shares from a Dirichlet distribution.

    Not flwr-datasets' partitioner, which rounds the cumulative shares of a class down: the last client gets
    what is left, of 77 classes of 5 texts twice as much as the first.
    """
    random = generator(seed, "partition", "classes")
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(DRAWS):
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(how.clients)]
        for rows in classes:
            counts = random.multinomial(len(rows), random.dirichlet([how.alpha] * how.clients))
            for part, own in zip(parts, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
                part.append(own)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, joined)) >= how.min_examples:
            return joined
    raise _too_few(len(labels), how)


def _sizes(examples: int, how: QuantityPartition, seed: int) -> list[int]:
    random = generator(seed, "partition", "sizes")
    for _ in range(DRAWS):
        cuts = np.floor(np.cumsum(random.dirichlet([how.alpha] * how.clients))[:-1] * examples).astype(int)
        sizes: NDArray[np.int64] = np.diff(np.concatenate([[0], cuts, [examples]]))
        if sizes.min() >= how.min_examples:
            return [int(size) for size in sizes]
    raise _too_few(examples, how)


def _too_few(examples: int, how: DirichletPartition | QuantityPartition) -> DataError:
    return DataError(
        f"data.partition: no draw in {DRAWS} gave each of {how.clients} clients {how.min_examples} of "
        f"{examples} private examples; lower min_examples or clients, or raise alpha"
    )


def _enough(pool: TextSet, clients: int) -> None:
    if len(pool) < clients:
        raise DataError(
            f"data.partition: {len(pool)} private examples for {clients} clients; client-{len(pool)} has none"
        )


def client_names(sources: Sequence[str]) -> list[str]:
    """Distinct names of clients and of their files: at most 64 letters, digits, ``-`` and ``_``.

    Other characters become ``-``. If that leaves nothing, or the same as for another source, eight digits of
    the source's hash are added.

    >>> client_names(["north", "New York", "a b", "a-b", "北京"])
    ['north', 'New-York', 'a-b-7faae47c', 'a-b', 'client-02aa4dd2']
    """
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "-", source).strip("-")[:64] for source in sources]
    often = Counter(plain)
    return [
        name
        if name and (often[name] == 1 or name == source)
        else f"{name[:55] or 'client'}-{hashlib.blake2b(source.encode(), digest_size=4).hexdigest()}"
        for name, source in zip(plain, sources, strict=True)
    ]
