"""Answers on disk, of a client or of the server (the teacher): files of shards, one of them in memory."""

from collections.abc import Callable, Iterator, Set
from dataclasses import asdict
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddistill import payload
from feddistill.seeds import derive
from feddistill.store import layout
from feddistill.store.logit_files import concatenate
from feddistill.store.run_directory import Json, RunDirectory
from feddistill.types import Cost, RoundSpec
from feddistill_kernels import TopK

T = TypeVar("T", Tensor, TopK)


def files(step: str, spec: RoundSpec) -> list[tuple[str, str]]:
    """Envelope and payload of each shard of the answer at ``step``.

    >>> spec = RoundSpec("", 1, "", 5, 2, "", "dense", 2, "", 1)
    >>> files("rounds/001/feedback", spec)
    [('rounds/001/feedback.json', 'rounds/001/feedback.safetensors')]
    """
    count = payload.shards(spec)
    names = [step] if count == 1 else [f"{step}.{shard:04d}" for shard in range(count)]
    return [(layout.envelope(name), layout.tensors(name)) for name in names]


def flat(step: str, spec: RoundSpec) -> list[str]:
    """All files of an answer."""
    return [name for both in files(step, spec) for name in both]


def draws(seed: int, number: int, name: str, shard: int) -> int:
    """Seed of the random ids that ``name`` samples for a shard of its answers in a round."""
    return derive(seed, "draws", number, name, *([shard] if shard else []))


def store(run: RunDirectory, step: str, spec: RoundSpec, cost: Cost, projection: Json | None = None) -> Json:
    """Commit the upload record of an answer whose files are in place. ``projection``: see ``Learner``."""
    names = flat(step, spec)
    size = sum(run.path(name).stat().st_size for name in names)
    record: Json = {"shards": payload.shards(spec), "bytes": size, "cost": asdict(cost)}
    if projection is not None:
        record["projection"] = projection
    return run.commit(step, record, names)


class StoredAnswer:
    """The answer at ``step``."""

    def __init__(self, run: RunDirectory, step: str, spec: RoundSpec):
        self.run = run
        self.spec = spec
        self.files = files(step, spec)
        self._held: tuple[int, payload.Answers] | None = None

    def admit(self, seen: Set[tuple[str, int]] = frozenset(), sender: str | None = None) -> str:
        """Validate every shard; returns the digest of the answer in the ledger.

        Raises:
            PayloadError: One of them is refused, and so the whole.
        """
        digests = []
        for shard, names in enumerate(self.files):
            envelope, content = map(self.run.read_bytes, names)
            now = self.spec.deadline
            answers = payload.admit(envelope, content, self.spec, seen, shard, sender=sender, now=now)
            self._held = shard, answers
            digests.append(payload.digest(content))
        return payload.digest_of(digests)

    def shard(self, number: int) -> payload.Answers:
        """A shard of an answer that has been admitted."""
        if self._held is None or self._held[0] != number:
            self._held = None  # otherwise two shards would be in memory
            content = self.run.read_bytes(self.files[number][1])
            self._held = number, payload.reread(content, self.spec, number)
        return self._held[1]

    def rows(self, start: int, stop: int) -> Iterator[payload.Answers]:
        """The rows from ``start`` to ``stop``, in one part per shard."""
        for number, first, last in payload.ranges(self.spec, start, stop):
            yield self.shard(number).rows(first, last)

    def picked(self, read: Callable[[payload.Answers], T], rows: NDArray[np.int64]) -> Iterator[T]:
        """Some ascending rows as ``read`` decodes them, shard by shard."""
        for number in range(payload.shards(self.spec)):
            start, stop = payload.rows_of(self.spec, number)
            here = rows[(start <= rows) & (rows < stop)] - start
            if len(here):
                yield read(self.shard(number))[torch.from_numpy(here)]


def answer_reader(read: Callable[[payload.Answers], T], stored: StoredAnswer) -> Callable[[int, int], T]:
    """A function from ``(start, stop)`` to these rows of a stored answer, as ``read`` decodes them."""

    def rows(start: int, stop: int) -> T:
        return concatenate([read(answers) for answers in stored.rows(start, stop)])

    return rows
