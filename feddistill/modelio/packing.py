"""Texts packed into blocks of tokens, in which every token is predicted once.

The texts form one stream, with an end token before the first and after each of them, or with a start token
before and an end token after each. A block has ``length`` tokens and begins with the last token of the block
before, or with the start token; it does not predict its first token. So row ``r`` predicts token ``r + 1`` of
the stream and belongs to block ``r // (length - 1)``.
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
    """``[R + 1]``, index of each token's text; end and start tokens belong to the text that they end or
    begin, but a first token that no text has itself has -1."""
    loss_mask: NDArray[np.bool_]
    """``[R]``, True if the token that a row predicts counts in losses and metrics."""
    length: int
    """Tokens of a block, at most."""
    inputs: Ints | None = None
    """``[R + 1]`` token ids to read instead of ``stream``, if tokens are masked; ``None``: ``stream``."""
    begin: int | None = None
    """Token that each block begins with; ``None``: the last token of the block before."""

    def masking(self, rows: Ints, token: int) -> "PackedTexts":
        """A copy in which the tokens that ``rows`` predict are replaced by ``token`` in the input.

        >>> blocks = pack([[5, 6, 7], [8]], end=0, length=4).masking(np.array([1]), 9)
        >>> [blocks[b].tolist() for b in range(len(blocks))], blocks.targets.tolist()
        ([[0, 5, 9, 7], [7, 0, 8, 0]], [5, 6, 7, 0, 8, 0])
        """
        inputs = self.stream.copy()
        inputs[rows + 1] = token
        return replace(self, inputs=inputs)

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
        read = self.stream if self.inputs is None else self.inputs
        tokens = read[start : start + self.length]
        return tokens if self.begin is None else np.append(self.begin, tokens[1:])

    def first(self, block: int) -> int:
        """The first row of a block; ``R`` for a block after the last."""
        return min(block * (self.length - 1), self.rows)


def pack(
    texts: Sequence[Sequence[int]],
    end: int,
    length: int,
    loss_mask: Sequence[Sequence[bool]] | None = None,
    *,
    begin: int | None = None,
    predict_first: bool = True,
) -> PackedTexts:
    """Pack the token ids of texts into blocks of ``length``.

    Args:
        texts: Without special tokens.
        end: Id of the end token.
        length: At least 2.
        loss_mask: For each token of each text, True if it counts; an end token counts if the text's last
            token does. ``None``: all count.
        begin: Id of the start token, before each text and at the beginning of each block; it is never
            predicted. ``None``: a text begins after the end of the one before, the first after an end token.
        predict_first: False if nothing stands before a text, so that its first token is not predicted.

    >>> blocks = pack([[5, 6, 7], [8]], end=0, length=4)
    >>> [blocks[b].tolist() for b in range(len(blocks))]
    [[0, 5, 6, 7], [7, 0, 8, 0]]
    >>> blocks.targets.tolist(), blocks.texts.tolist()
    ([5, 6, 7, 0, 8, 0], [-1, 0, 0, 0, 0, 1, 1])
    >>> blocks = pack([[5, 6, 7], [8]], end=0, length=4, begin=1)
    >>> [blocks[b].tolist() for b in range(len(blocks))]
    [[1, 5, 6, 7], [1, 0, 1, 8], [1, 0]]
    """
    parts: list[NDArray[np.int64]] = []
    masks: list[NDArray[np.bool_]] = []
    place = 0  # in the stream, without its first token
    for index, text in enumerate(texts):
        mask = np.ones(len(text), bool) if loss_mask is None else np.asarray(loss_mask[index], bool)
        mask = np.append(mask, mask[-1] if len(mask) else True)
        mask[0] &= predict_first
        part = np.append(np.asarray(text, np.int64), end)
        # A block that begins here, or an end token that is the start token, begins the text already.
        if begin is not None and begin != end and place % (length - 1):
            part, mask = np.append(begin, part), np.append(False, mask)
        parts.append(part)
        masks.append(mask)
        place += len(part)
    numbers = np.repeat(np.arange(len(texts)), np.array([len(part) for part in parts], np.int64))
    stream = np.concatenate([*parts, np.zeros(0, np.int64)])
    counted = np.concatenate([*masks, np.zeros(0, bool)])
    if predict_first or not texts:
        stream = np.append(end if begin is None else begin, stream)
        numbers = np.append(-1, numbers)
    else:
        counted = counted[1:]
    return PackedTexts(stream, numbers, counted, length, begin=begin)
