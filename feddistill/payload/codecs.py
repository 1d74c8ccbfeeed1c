"""The tensors of each codec, and the checks of their values."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddistill.errors import DataError
from feddistill.payload import refusals
from feddistill.payload.answers import CODES, FLOOR, Answers, Dense, Ranked, Sampled, fill_ids
from feddistill.types import RoundSpec

WIDE = 2**16
"""Larger vocabularies need a third byte per id."""
LARGEST = 2**24
"""The largest vocabulary: three bytes per id."""
MASS = (0.9, 1.1)
"""Range of the sum of a row's encoded probabilities."""
BLOCK = 1 << 18
"""Entries checked at a time: temporary copies stay below 10 MiB, whatever arrives."""

Tensors = dict[str, NDArray[Any]]
U8, U16 = np.dtype("uint8"), np.dtype("<u2")

CODECS = ("dense", "topk", "threshold", "sampled")
COMPRESSIONS = ("none", "zstd")


def check_request(spec: RoundSpec) -> None:
    """Raise ``DataError`` for a request that no answer could satisfy."""
    required: dict[str, tuple[bool, str]] = {
        "codec": (spec.codec in CODECS, f"one of {', '.join(CODECS)}"),
        "compression": (spec.compression in COMPRESSIONS, f"one of {', '.join(COMPRESSIONS)}"),
        "positions": (1 <= spec.positions < 2**32, "from 1 to 2^32 - 1"),
        "vocab_size": (1 <= spec.vocab_size <= LARGEST, f"from 1 to {LARGEST}"),
        "k": (1 <= spec.k <= min(spec.vocab_size, WIDE - 1), "from 1 to vocab_size and 65,535"),
        "max_code": (0 <= spec.max_code <= FLOOR, f"from 0 to {FLOOR}"),
        "shard_rows": (0 <= spec.shard_rows < spec.positions, "0 or fewer than positions"),
    }
    if spec.codec == "dense":
        required |= {"k": (spec.k == spec.vocab_size, f"{spec.vocab_size}, the number of classes")}
    if spec.codec == "sampled":
        required |= {
            "draws": (1 <= spec.draws < CODES, f"from 1 to {CODES - 1}"),
            "k": (spec.k == min(spec.draws, spec.vocab_size), "the lesser of draws and vocab_size"),
        }
    for name, (holds, words) in required.items():
        if not holds:
            raise DataError(f"request: {name} must be {words}, got {getattr(spec, name)!a}")


def layout(spec: RoundSpec) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Types and shapes of the tensors of an answer to ``spec``, sorted by name."""
    rows, k = spec.positions, spec.k
    if spec.codec == "dense":
        return {"dense": (U8, (rows, spec.vocab_size))}
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {"idx": (U16, (rows, k))}
    if spec.vocab_size > WIDE:
        tensors |= {"idx_hi": (U8, (rows, k))}
    if spec.codec == "sampled":
        tensors |= {"cnt": (U8, (rows, k))}
    else:
        tensors |= {"val": (U8, (rows, k)), "tail": (U8, (rows,))}
    if spec.codec == "threshold":
        tensors |= {"n": (U16, (rows,))}
    return dict(sorted(tensors.items()))


def row_bytes(spec: RoundSpec) -> int:
    """Bytes of one row, before compression."""
    return sum(dtype.itemsize * int(np.prod(shape[1:])) for dtype, shape in layout(spec).values())


def tensors_of(answers: Answers) -> Tensors:
    """The tensors of answers, named as in ``layout``."""
    if isinstance(answers, Dense):
        return {"dense": answers.codes}
    tensors: Tensors = {"idx": (answers.stored & 0xFFFF).astype(U16)}
    if answers.vocab_size > WIDE:
        tensors |= {"idx_hi": (answers.stored.astype(np.int32) >> 16).astype(U8)}
    if isinstance(answers, Sampled):
        return tensors | {"cnt": answers.counts}
    tensors |= {"val": answers.codes, "tail": answers.tail}
    return tensors if answers.lengths is None else tensors | {"n": answers.lengths.astype(U16)}


def answers_of(tensors: Tensors, spec: RoundSpec) -> Answers:
    """Answers from tensors of the right types and shapes, as views if possible; values are not checked."""
    match spec.codec:
        case "dense":
            return Dense(*tensors.values())
        case "sampled":
            return _sampled(spec, **tensors)
        case _:
            return _ranked(spec, **tensors)


def _sampled(
    spec: RoundSpec, *, idx: NDArray[Any], cnt: NDArray[Any], idx_hi: NDArray[Any] | None = None
) -> Sampled:
    return Sampled(_ids(idx, idx_hi), cnt, spec.draws, spec.vocab_size)


def _ranked(
    spec: RoundSpec,
    *,
    idx: NDArray[Any],
    val: NDArray[Any],
    tail: NDArray[Any],
    idx_hi: NDArray[Any] | None = None,
    n: NDArray[Any] | None = None,
) -> Ranked:
    return Ranked(_ids(idx, idx_hi), val, tail, spec.vocab_size, n)


def _ids(low: NDArray[Any], high: NDArray[Any] | None) -> NDArray[Any]:
    """Ids from their low 16 bits and, in large vocabularies, their third byte."""
    if high is None:
        return low
    ids: NDArray[Any] = high.astype(np.int32)
    ids <<= 16
    ids |= low
    return ids


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks of the values, block by block of rows."""

    spec: RoundSpec
    client: str

    def __call__(self, answers: Answers) -> None:
        """Raise the refusal for the first invalid block."""
        step = max(1, BLOCK // answers.k)
        for start in range(0, len(answers), step):
            block = answers.rows(start, start + step)
            if isinstance(block, Ranked):
                self._ranked(block, start)
            elif isinstance(block, Sampled):
                self._sampled(block, start)
            self._mass(block, start)

    def _ranked(self, block: Ranked, start: int) -> None:
        ids = block.ids
        self._range(ids)
        if block.lengths is not None:
            outside = np.logical_or(block.lengths < 1, block.lengths > block.k)
            self._refuse(outside, refusals.WrongLength, "n", f"from 1 to {block.k}", block.lengths, start)
        ordered = np.sort(ids, axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        self._refuse(repeated, refusals.IdRepeated, "idx", "distinct in each row", "a repetition", start)
        kept = block.kept()
        if kept is not None:
            filled = np.where(kept, 0, ids) == fill_ids(block.stored, kept)
            wrong = ~np.logical_and(filled, np.logical_or(kept, block.codes == FLOOR)).all(1)
            required = f"the lowest other ids with code {FLOOR} behind the row's length"
            self._refuse(wrong, refusals.WrongPadding, "idx and val", required, "others", start)
            faint = np.logical_and(kept, block.codes > self.spec.max_code)[:, 1:].any(1)
            required = f"at most {self.spec.max_code} behind a row's first"
            self._refuse(faint, refusals.BelowThreshold, "val", required, "a larger one", start)
        wrong = (block.codes[:, 1:] < block.codes[:, :-1]).any(1)
        self._refuse(wrong, refusals.NotInOrder, "val", "in rank order", "another order", start)
        tied = np.logical_and(block.codes[:, 1:] == block.codes[:, :-1], ids[:, 1:] < ids[:, :-1])
        if kept is not None:
            tied &= kept[:, 1:]
        required = "ascending where values are equal"
        self._refuse(tied.any(1), refusals.NotInOrder, "idx", required, "another order", start)
        wrong = np.logical_and(block.whole(), block.tail != FLOOR)
        required = f"{FLOOR} where every id is kept"
        self._refuse(wrong, refusals.WrongPadding, "tail", required, block.tail, start)

    def _sampled(self, block: Sampled, start: int) -> None:
        ids = block.ids
        self._range(ids)
        repeated = (ids[:, 1:] == ids[:, :-1]).any(1)
        self._refuse(repeated, refusals.IdRepeated, "idx", "distinct in each row", "a repetition", start)
        wrong = (ids[:, 1:] < ids[:, :-1]).any(1)
        self._refuse(wrong, refusals.NotInOrder, "idx", "ascending", "another order", start)
        # Ids ascend: if id i is at index i, the row contains all ids below it too.
        wrong = np.logical_and(block.counts == 0, ids != np.arange(block.k)).any(1)
        required = "the lowest others where nothing was drawn"
        self._refuse(wrong, refusals.WrongPadding, "idx", required, "others", start)
        draws = block.counts.sum(1, dtype=np.int64)
        self._refuse(draws != block.draws, refusals.WrongDraws, "sum of cnt", str(block.draws), draws, start)

    def _range(self, ids: NDArray[np.int32]) -> None:
        if (largest := int(ids.max())) >= self.spec.vocab_size:
            required = f"below {self.spec.vocab_size}"
            raise refusals.IdOutOfRange(self.client, self.spec.round, "idx", required, largest)

    def _mass(self, block: Answers, start: int) -> None:
        mass = block.mass()
        wrong = np.logical_or(mass < MASS[0], mass > MASS[1])
        self._refuse(wrong, refusals.WrongMass, "sum of probabilities", f"within {list(MASS)}", mass, start)

    def _refuse(
        self,
        wrong: Any,
        kind: type[refusals.Refusal],
        field: str,
        required: str,
        given: NDArray[Any] | str,
        start: int,
    ) -> None:
        """Refuse the first of the ``wrong`` rows, if there is one."""
        if wrong.any():
            row = int(wrong.argmax())
            value = given if isinstance(given, str) else _shown(given[row])
            raise kind(self.client, self.spec.round, field, required, f"{value} in row {start + row}")


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, np.floating) else str(value)
