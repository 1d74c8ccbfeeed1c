"""Shards: the payloads of an answer that is too large for one message."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from feddistill.payload.codecs import row_bytes
from feddistill.types import RoundSpec


def shards(spec: RoundSpec) -> int:
    """The number of payloads of a whole answer."""
    return -(-spec.positions // spec.shard_rows) if spec.shard_rows else 1


def rows_of(spec: RoundSpec, shard: int) -> tuple[int, int]:
    """``(start, stop)`` of the rows of a shard."""
    if not spec.shard_rows:
        return 0, spec.positions
    start = shard * spec.shard_rows
    return start, min(start + spec.shard_rows, spec.positions)


def ranges(spec: RoundSpec, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The parts ``(shard, start, stop)`` of some rows; rows are counted from the first of the shard.

    >>> spec = RoundSpec("", 1, "", 10, 2, "", "dense", 2, "", 1, shard_rows=4)
    >>> list(ranges(spec, 3, 10))
    [(0, 3, 4), (1, 0, 4), (2, 0, 2)]
    """
    for shard in range(shards(spec)):
        first, end = rows_of(spec, shard)
        if first < stop and start < end:
            yield shard, max(start, first) - first, min(stop, end) - first


def split(spec: RoundSpec, content: int) -> RoundSpec:
    """The same request, with shards if an answer has more than ``content`` bytes before compression."""
    size = row_bytes(spec)
    return spec if spec.positions * size <= content else replace(spec, shard_rows=max(1, content // size))


def digest_of(digests: Sequence[str]) -> str:
    """The digest of an answer in the ledger: the payload's own, or that of the digests of several shards."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.blake2b("".join(digests).encode("ascii"), digest_size=32).hexdigest()
