"""Divide a pool of private texts among clients with flwr-datasets' partitioners."""

import re
import warnings
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
from feddistill.seeds import derive, generator
from feddistill.types import TextSet


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
            divide = flwr.DirichletPartitioner(
                how.clients,
                partition_by="label",
                alpha=how.alpha,
                min_partition_size=how.min_examples,
                self_balancing=False,
                seed=derive(seed, "partition"),
            )
        case BySourcePartition():
            if shuffled.sources is None:
                raise DataError("data.partition by_source needs data.source.source_column")
            columns["source"] = list(shuffled.sources)
            divide = flwr.NaturalIdPartitioner(partition_by="source")
        case QuantityPartition():
            divide = flwr.SizePartitioner(_sizes(len(pool), how, seed))
    divide.dataset = Dataset.from_dict(columns)
    try:
        # flwr_datasets prints progress on stderr, and warns when min_examples makes it repeat a draw.
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="The specified min_partition_size", category=UserWarning
            )
            parts = [
                np.sort(np.asarray(divide.load_partition(i)["row"])) for i in range(divide.num_partitions)
            ]
    except ValueError as error:  # no Dirichlet draw gave every client enough
        raise DataError(
            f"data.partition: no draw in ten gave each client {getattr(how, 'min_examples', 1)} of "
            f"{len(pool)} private examples; lower min_examples or clients, or raise alpha"
        ) from error
    if isinstance(how, BySourcePartition):
        names = [_client_name(divide.partition_id_to_natural_id[i]) for i in range(len(parts))]
        if len(set(names)) < len(names):
            raise DataError(f"data.partition: sources give the same client name: {', '.join(sorted(names))}")
    return tuple(
        shuffled.select(rows, name=names[i] if names else f"client-{i}") for i, rows in enumerate(parts)
    )


def _sizes(examples: int, how: QuantityPartition, seed: int) -> list[int]:
    random = generator(seed, "partition", "sizes")
    for _ in range(1000):
        cuts = np.floor(np.cumsum(random.dirichlet([how.alpha] * how.clients))[:-1] * examples).astype(int)
        sizes: NDArray[np.int64] = np.diff(np.concatenate([[0], cuts, [examples]]))
        if sizes.min() >= how.min_examples:
            return [int(size) for size in sizes]
    raise DataError(
        f"data.partition: no draw in 1000 gave each of {how.clients} clients {how.min_examples} of "
        f"{examples} private examples; lower min_examples or clients, or raise alpha"
    )


def _enough(pool: TextSet, clients: int) -> None:
    if len(pool) < clients:
        raise DataError(
            f"data.partition: {len(pool)} private examples for {clients} clients; client-{len(pool)} has none"
        )


def _client_name(source: object) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", str(source)).strip("-")[:64] or "client"
