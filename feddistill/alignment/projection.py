"""Project a client's predictions of a text to predictions of the student's tokens of the same text.

Both tokenizers read the same bytes.  Let the student's token cover bytes ``[o, e)``, let ``a`` be the
client's token that contains byte ``o`` and begins at ``u <= o``, and ``b`` the one that contains byte
``e - 1``.  The student's row is the client's distribution of the bytes from ``o`` on, given all before ``o``:

1. If ``u = o``, it is row ``a``.  If ``u < o``, row ``a`` is conditioned on the bytes ``[u, o)``: tokens that
   begin with them keep their remaining bytes.  The tail of the row, and tokens that end at or before ``o``,
   may or may not agree with the text and may continue in any way: their mass stays in the norm and goes to
   the tail.  So a client that is uncertain of a token leaves much mass in the tail of its inner pieces.
2. If ``a < b``, by the chain rule the mass of token ``a`` itself is split further by row ``a + 1``, whose
   tokens follow ``a``'s bytes, and so on to ``b``.
3. Bytes are mapped to the student's id of the same bytes, or else to their first piece: for one token by the
   ``VocabularyMap``, for bytes joined in step 1 or 2 to the longest of the student's tokens that they begin
   with.  The token in the text is mapped to the piece in the text.  Bytes without a piece go to the tail.

Mass is conserved: the entries and the tail of a row add up to one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from feddistill.alignment.joined import Joiner
from feddistill.alignment.rows import Floats, ProjectedMass, Projection, collect, row_of_each
from feddistill.alignment.spans import Mask, Reading
from feddistill.alignment.strings import Ints, Strings
from feddistill.alignment.vocabulary import BYTES, METASPACE, WORDPIECE, is_word_character
from feddistill.alignment.vocabulary_map import NOWHERE, VocabularyMap
from feddistill_kernels import TopK

THRESHOLD = 0.5


def project(
    answers: TopK,
    client: Reading,
    student: Reading,
    mapped: VocabularyMap,
    *,
    predicted: NDArray[np.integer] | None = None,
    threshold: float = THRESHOLD,
    k: int | None = None,
    vocab_size: int | None = None,
) -> Projection:
    """Project a client's predictions of its tokens of a text to the student's tokens of the same text.

    A row predicts a token from all tokens before it.  (A causal model's output at a token predicts the next
    one.)

    Args:
        answers: ``N`` rows over the client's vocabulary.
        client: The text as the client reads it; it may be truncated.
        student: The same text as the student reads it.
        mapped: The map of the two vocabularies.
        predicted: ``[N]``, the client's token that each row predicts; ``None`` if there is one row for each
            token, in order.
        threshold: In [0, 1]; tokens whose coverage is smaller get no row.
        k: Entries per row; the client's by default.
        vocab_size: Of the student's model, if it is larger than its tokenizer's.

    Returns:
        Rows of distinct ids, likeliest first.  A row with fewer than ``k`` ids is filled with the lowest
        others, each with an equal share of the tail, which is how missing ids are read anyway.  With the
        same tokenizer, the same tokens and the same ``k``, the client's rows unchanged.

    Raises:
        ValueError: Texts differ, rows are not distributions or predict no token, or a size does not fit.

    Memory: About 100 bytes for each of ``N k`` entries.
    """
    row_of = row_of_each(answers, client, predicted)
    size = len(mapped.student) if vocab_size is None else vocab_size
    kept = answers.ids.shape[1] if k is None else k
    _check(answers, client, student, mapped, threshold, kept, size)
    alike = mapped.identity and size == answers.vocab_size and kept == answers.ids.shape[1]
    if alike and np.array_equal(client.ids, student.ids):
        answered = row_of >= 0
        rows = answers[torch.from_numpy(row_of[answered])].to("cpu", dtype=torch.float32)
        return Projection(rows, answered, answered.astype(np.float64))
    projector = _Projector(answers, client, student, mapped, row_of)
    for depth in range(int((projector.last - projector.first).max(initial=-1)) + 1):
        projector.descend(depth)
    return collect(projector.projected, len(student), kept, size, threshold)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The ``m`` tokens of a reading that cover text: each begins where the one before it ends."""

    index: Ints
    """``[m]``, their indices in the reading."""
    ids: Ints
    starts: Ints
    """``[m]`` first bytes, with the white space before a token that no token reads."""
    reads: Ints
    """``[m]`` first bytes, without it."""
    ends: Ints
    bare: Mask
    faithful: Mask

    @staticmethod
    def of(reading: Reading, eos_id: int | None) -> "_Tokens":
        """Select them; an end token covers one byte after the text."""
        ends, faithful = reading.ends.copy(), reading.faithful.copy()
        if len(reading) and reading.added[-1] and reading.ids[-1] == eos_id:
            ends[-1] = len(reading.text) + 1
            faithful[-1] = True
        before = np.concatenate([[0], ends])[: len(ends)].astype(np.int64)
        index = np.flatnonzero(ends > before)
        reads = np.maximum(reading.starts, before)[index]
        ids = reading.ids[index].astype(np.int64)
        return _Tokens(index, ids, before[index], reads, ends[index], reading.bare[index], faithful[index])


def _check(
    answers: TopK,
    client: Reading,
    student: Reading,
    mapped: VocabularyMap,
    threshold: float,
    k: int,
    vocab_size: int,
) -> None:
    if client.text != student.text:
        raise ValueError("client and student have read different texts")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k must be in [1, {vocab_size}], got {k}")
    if answers.vocab_size < len(mapped.client):
        raise ValueError(
            f"answers are over {answers.vocab_size} ids, the client's tokenizer has {len(mapped.client)}"
        )
    if vocab_size < len(mapped.student):
        raise ValueError(f"vocab_size = {vocab_size}, the student's tokenizer has {len(mapped.student)}")
    mass = answers.log_probs.double().exp().sum(1) + answers.log_tail.double().exp()
    wrong = torch.nonzero(~((mass - 1).abs() < 1e-3)).flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"row {row} is no distribution: its probabilities add up to {float(mass[row])}")


class _Projector:
    """Projects to the ``P`` tokens of the student that the client has a row for."""

    def __init__(self, answers: TopK, client: Reading, student: Reading, mapped: VocabularyMap, row_of: Ints):
        self.mapped, self.text = mapped, student.text
        self.theirs = _Tokens.of(client, mapped.client.eos_id)
        ours = _Tokens.of(student, mapped.student.eos_id)
        self.ids = answers.ids.cpu().numpy().astype(np.int64)
        self.probs: Floats = answers.log_probs.double().exp().cpu().numpy()
        self.tails: Floats = answers.log_tail.double().exp().cpu().numpy()
        self.row: Ints = row_of[self.theirs.index]
        first = np.searchsorted(self.theirs.ends, ours.starts, side="right")
        last = np.searchsorted(self.theirs.ends, ours.ends, side="left")
        chosen = np.flatnonzero(last < len(self.theirs.ends))
        a = first[chosen]
        chosen = chosen[(self.row[a] >= 0) & self.theirs.faithful[a]]
        self.first, self.last = first[chosen], last[chosen]
        self.begin, self.reads = ours.starts[chosen], ours.reads[chosen]
        self.target, self.bare = ours.ids[chosen], ours.bare[chosen]
        eos = self.target == (-1 if mapped.student.eos_id is None else mapped.student.eos_id)
        self.sure = eos | (mapped.student.strings.lengths[self.target] > 0)
        """``[P]``, False if the student reads an unknown token, whose piece is not known."""
        self.weight = np.ones(len(chosen))
        kept = 1 - self.tails[self.row[self.first]]
        self.projected = ProjectedMass(ours.index[chosen], kept, np.zeros(len(chosen)))
        self.joiner = Joiner(Strings([student.text]), mapped.client, mapped.student)
        self.in_word = (
            _ends_of_word_characters(student.text)
            if WORDPIECE in (mapped.client.kind, mapped.student.kind)
            else np.zeros(len(student.text) + 2, np.bool_)
        )

    def descend(self, depth: int) -> None:
        """Distribute the mass that has reached the client's token ``first + depth`` by that token's row."""
        places = np.flatnonzero((self.weight > 0) & (self.first + depth <= self.last))
        token = self.first[places] + depth
        lost = (self.row[token] < 0) | ~self.theirs.faithful[token]
        self.projected.tail[places[lost]] += self.weight[places[lost]]
        self.weight[places[lost]] = 0
        places, token = places[~lost], token[~lost]
        row = self.row[token]
        ids, mass, rest = self.ids[row], self.probs[row].copy(), self.tails[row].copy()
        base, skip = self._cores(token, ids)
        begin = self.begin[places][:, None]
        inner = self.begin[places] > self.theirs.starts[token]
        unknown = np.zeros(ids.shape, np.bool_)
        if inner.any():
            unknown[inner] = self._condition(begin, base, skip, ids, mass, rest, inner)
        mass *= self.weight[places, None]
        self.projected.tail[places] += rest * self.weight[places]
        target = self._targets(depth, places, token, ids, base, skip, unknown, mass)
        is_text = ids == self.theirs.ids[token][:, None]
        last = token == self.last[places]
        row_index, column = np.nonzero(is_text & (last & self.sure[places])[:, None])
        target[row_index, column] = self.target[places][row_index]
        self.weight[places] = np.where(last, 0.0, np.where(is_text, mass, 0.0).sum(1))
        mass[is_text & ~last[:, None]] = 0
        target[unknown] = NOWHERE
        self.projected.parts.append((np.repeat(places, ids.shape[1]), target.ravel(), mass.ravel()))

    def _cores(self, token: Ints, ids: Ints) -> tuple[Ints, Ints]:
        """``[A, k]``: the byte of the text at which a token would begin, and how many of its first bytes are
        a space that the text has as other white space or not at all."""
        client, theirs = self.mapped.client, self.theirs
        base = np.repeat(theirs.starts[token][:, None], ids.shape[1], axis=1)
        if client.kind == BYTES:
            return base, np.zeros_like(ids)
        known = np.minimum(ids, len(client) - 1)
        spaced = client.spaced[known] & (ids < len(client))
        if client.kind == METASPACE:
            return base, (spaced & theirs.bare[token][:, None]).astype(np.int64)
        gap = theirs.reads[token] > theirs.starts[token]
        glued = (self.in_word[theirs.starts[token]] & ~gap)[:, None] & client.word[known]
        own = spaced & ~glued
        return np.where(own, theirs.reads[token][:, None], base), own.astype(np.int64)

    def _condition(
        self, begin: Ints, base: Ints, skip: Ints, ids: Ints, mass: Floats, rest: Floats, inner: Mask
    ) -> Mask:
        """Condition inner rows of ``mass`` and ``rest`` on the text before ``begin``, in place.

        Returns:
            True for tokens that agree with the text but end at or before ``begin``: how they continue is
            unknown.
        """
        known, lengths = self._known(ids[inner])
        end = np.repeat(begin[inner], ids.shape[1], axis=1)
        flat = [array.ravel() for array in (base[inner], end, known, skip[inner])]
        first, stop, number, leave = flat
        before = np.clip(stop - first, 0, None)
        agree = self.joiner.agree(first, first + before, number, leave).reshape(end.shape) & (lengths > 0)
        short = agree & (lengths - skip[inner] <= before.reshape(end.shape)) & (base[inner] < end)
        part = np.where(agree, mass[inner], 0.0)
        norm = part.sum(1) + rest[inner]
        norm[norm == 0] = 1
        mass[inner] = part / norm[:, None]
        rest[inner] /= norm
        return np.asarray(short)

    def _known(self, ids: Ints) -> tuple[Ints, Ints]:
        """Ids clipped to those of the tokenizer, and their numbers of bytes; 0 for ids outside of it."""
        client = self.mapped.client
        which = np.minimum(ids, len(client) - 1)
        return which, np.where(ids < len(client), client.strings.lengths[which], 0)

    def _targets(
        self,
        depth: int,
        places: Ints,
        token: Ints,
        ids: Ints,
        base: Ints,
        skip: Ints,
        unknown: Mask,
        mass: Floats,
    ) -> Ints:
        """``[A, k]``, the student's ids, or ``NOWHERE``."""
        target = np.full(ids.shape, NOWHERE, np.int64)
        begin = self.begin[places]
        whole = np.zeros(ids.shape, np.bool_)
        if depth == 0:
            gap = base - begin[:, None]
            # One byte of white space that is skipped and read again counts as a space.
            whole = (begin == self.theirs.starts[token])[:, None] & ((gap == 0) | (gap == skip))
            odd = self._odd_space(begin)
            whole &= ~((gap == 1) & odd[:, None])
            target = np.where(whole, self._mapped(places, ids, (skip == 1) & (gap == 0)), target)
        rows, columns = np.nonzero(~whole & ~unknown & (mass > 0))
        if not len(rows):
            return target
        which, lengths = self._known(ids[rows, columns])
        core, leave, first = base[rows, columns], skip[rows, columns], begin[rows]
        leave = np.where(lengths > 0, leave + np.clip(first - core, 0, None), 0)
        end = np.maximum(core, first)
        reads, bare = self.reads[places][rows], self.bare[places][rows]
        blank = (self.mapped.student.kind == WORDPIECE) & (reads > first) & (end >= reads)
        starts_spaced = (end == first) & (leave == 0) & self.mapped.client.spaced[which]
        lead = blank | (bare & ~starts_spaced)
        first = np.where(blank, reads, first)
        # An id without bytes adds nothing to the bytes before it.
        none = ids[rows, columns] >= len(self.mapped.client)
        pieces = self.joiner.first_pieces(first, end, lead, which, np.where(lengths > 0, leave, 0))
        target[rows, columns] = np.where(none, NOWHERE, pieces)
        return target

    def _odd_space(self, begin: Ints) -> Mask:
        """True if the byte at ``begin`` is not a space."""
        text = np.frombuffer(self.text + b" ", np.uint8)
        return np.asarray(text[np.minimum(begin, len(self.text))] != ord(" "))

    def _mapped(self, places: Ints, ids: Ints, stripped: Mask) -> Ints:
        """Map whole tokens: with their own space, without it, or with one added."""
        mapped = self.mapped
        which = np.minimum(ids, len(mapped.client) - 1)
        if mapped.student.kind == BYTES:
            lead = np.zeros(ids.shape, np.bool_)
        elif mapped.student.kind == METASPACE:
            lead = np.repeat(self.bare[places][:, None], ids.shape[1], axis=1)
        else:
            lead = ~(self.in_word[self.begin[places]][:, None] & mapped.client.word[which])
        target = mapped.plain[which].astype(np.int64)
        if stripped.any():
            target = np.where(stripped & ~lead, mapped.bare[which], target)
        if lead.any():
            target = np.where(lead & ~stripped, mapped.spaced[which], target)
        return np.where(ids < len(mapped.client), target, NOWHERE)


def _ends_of_word_characters(text: bytes) -> Mask:
    """``[B + 2]``, True if a character inside a word ends before that byte."""
    ends = np.zeros(len(text) + 2, np.bool_)
    place = 0
    for character in text.decode():
        place += len(character.encode())
        ends[place] = is_word_character(character)
    return ends
