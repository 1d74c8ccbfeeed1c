"""Texts packed into blocks of tokens, in which every token is predicted once.

All texts stand one after the other with an end token before, between and behind them. A block has
``length`` tokens and begins with the last one of the block before, which it does not predict. So row ``r``
predicts token ``r + 1`` of the stream, and stands in block ``r // (length - 1)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """``R`` rows in ``B`` blocks."""

    stream: Ints
    """``[R + 1]`` token ids."""
    texts: Ints
    """``[R + 1]``, of which text a token is; an end token is of the text that it ends, the first of -1."""
    wanted: NDArray[np.bool_]
    """``[R]``, whether the token that a row predicts is one to learn and to judge by."""
    length: int
    """Tokens of a block, at most."""
    shown: Ints | None = None
    """``[R + 1]``, what is read in the place of ``stream``, where tokens are hidden."""

    def masking(self, rows: Ints, token: int) -> "PackedTexts":
        """The same, with ``token`` read in the place of those that ``rows`` predict.

        >>> blocks = pack([[5, 6, 7], [8]], end=0, length=4).masking(np.array([1]), 9)
        >>> [blocks[b].tolist() for b in range(len(blocks))], blocks.targets.tolist()
        ([[0, 5, 9, 7], [7, 0, 8, 0]], [5, 6, 7, 0, 8, 0])
        """
        shown = self.stream.copy()
        shown[rows + 1] = token
        return replace(self, shown=shown)

    @property
    def rows(self) -> int:
        """``R``."""
        return len(self.stream) - 1

    @property
    def targets(self) -> Ints:
        """``[R]``, the token that each row predicts."""
        return self.stream[1:]

    def __len__(self) -> int:
        """``B``."""
        return -(-self.rows // (self.length - 1))

    def __getitem__(self, block: int) -> Ints:
        """The tokens of a block."""
        if not 0 <= block < len(self):
            raise IndexError(block)
        start = self.first(block)
        read = self.stream if self.shown is None else self.shown
        return read[start : start + self.length]

    def first(self, block: int) -> int:
        """The first row of a block; one that is past the last block is ``R``."""
        return min(block * (self.length - 1), self.rows)


def pack(
    texts: Sequence[Sequence[int]],
    end: int,
    length: int,
    wanted: Sequence[Sequence[bool]] | None = None,
) -> PackedTexts:
    """Token ids of texts as blocks of ``length``.

    Args:
        texts: Without special tokens.
        end: Id of the end token.
        length: At least 2.
        wanted: For each token of each text; the end token is wanted where the text's last one is. ``None``
            for all.

    >>> blocks = pack([[5, 6, 7], [8]], end=0, length=4)
    >>> [blocks[b].tolist() for b in range(len(blocks))]
    [[0, 5, 6, 7], [7, 0, 8, 0]]
    >>> blocks.targets.tolist(), blocks.texts.tolist()
    ([5, 6, 7, 0, 8, 0], [-1, 0, 0, 0, 0, 1, 1])
    """
    parts: list[NDArray[np.int64]] = [np.array([end], np.int64)]
    masks: list[NDArray[np.bool_]] = []
    for index, text in enumerate(texts):
        parts.append(np.append(np.asarray(text, np.int64), end))
        mask = np.ones(len(text), bool) if wanted is None else np.asarray(wanted[index], bool)
        masks.append(np.append(mask, mask[-1] if len(mask) else True))
    sizes = np.array([len(part) for part in parts])
    return PackedTexts(
        stream=np.concatenate(parts),
        texts=np.repeat(np.arange(-1, len(texts)), sizes),
        wanted=np.concatenate(masks) if masks else np.zeros(0, bool),
        length=length,
    )
