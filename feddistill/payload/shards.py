"""An answer that is too large for one message, in payloads of so many rows each: its shards."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from feddistill.payload.codecs import row_bytes
from feddistill.types import RoundSpec


def shards(spec: RoundSpec) -> int:
    """Payloads that a whole answer has."""
    return -(-spec.positions // spec.shard_rows) if spec.shard_rows else 1


def rows_of(spec: RoundSpec, shard: int) -> tuple[int, int]:
    """``(start, stop)`` of the rows of a shard."""
    if not spec.shard_rows:
        return 0, spec.positions
    start = shard * spec.shard_rows
    return start, min(start + spec.shard_rows, spec.positions)


def pieces(spec: RoundSpec, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """``(shard, start, stop)`` that make up some rows; the rows are counted from the beginning of the shard.

    >>> spec = RoundSpec("", 1, "", 10, 2, "", "dense", 2, "", 1, shard_rows=4)
    >>> list(pieces(spec, 3, 10))
    [(0, 3, 4), (1, 0, 4), (2, 0, 2)]
    """
    for shard in range(shards(spec)):
        first, end = rows_of(spec, shard)
        if first < stop and start < end:
            yield shard, max(start, first) - first, min(stop, end) - first


def cut(spec: RoundSpec, content: int) -> RoundSpec:
    """The same request, in shards where an answer has more than ``content`` bytes before compression."""
    size = row_bytes(spec)
    return spec if spec.positions * size <= content else replace(spec, shard_rows=max(1, content // size))


def digest_of(digests: Sequence[str]) -> str:
    """What a ledger holds of an answer with such payloads: the payload's own digest where it is one."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.blake2b("".join(digests).encode("ascii"), digest_size=32).hexdigest()
