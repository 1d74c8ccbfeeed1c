"""A client's answers to a text, as answers about the student's tokens of that text.

Both tokenizers read the same bytes.  Let the student's token stand for bytes ``[o, e)``, ``a`` be the
client's token that has byte ``o``, which begins at ``u <= o``, and ``b`` the one that has byte ``e - 1``.
The student's row is what the client says of the bytes from ``o`` on, given all before ``o``:

1. ``u = o``: row ``a`` says it.  ``u < o``: only its tokens that begin with the bytes ``[u, o)`` agree with
   what is given; they are conditioned on, and what is left of their bytes is said.  The whole tail of the
   row, and the tokens that end before ``o`` or just there, may agree or not and go on in any way: all of
   their mass stays in the norm, and goes to the tail.  So a client that knows little of a token says
   little of its inner pieces.
2. ``a < b``: by the chain rule the mass of token ``a`` itself is split further by row ``a + 1``, whose
   tokens stand behind ``a``'s bytes, and so on to ``b``.
3. Bytes go to the student's id that stands for them, else to the first piece of them: of one token by the
   ``VocabularyMap``, of bytes joined in step 1 or 2 to the longest of the student's tokens that they begin
   with.  The text's own token goes to the text's own piece.  What has no piece goes to the tail.

Mass is neither made nor lost: what is kept and the tail add up to one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from feddistill.alignment.joined import Joiner
from feddistill.alignment.rows import Floats, Projection, Said, collect, row_of_each
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
    """Project a client's answers about its tokens of a text to the student's tokens of the same text.

    A row is about a token: what was said of it when only what stands before it had been read.  (A causal
    model's output at a token is about the next one.)

    Args:
        answers: ``N`` rows over the client's vocabulary.
        client: The text as the client read it; it may be cut short.
        student: The same text as the student reads it.
        mapped: Of the two vocabularies.
        predicted: ``[N]``, the client's token that each row is about; ``None`` where there is a row for
            every one in order.
        threshold: In [0, 1]; rows that cover less are not answered.
        k: Entries that a row keeps; the client's by default.
        vocab_size: Of the student's model where it is larger than its tokenizer's.

    Returns:
        Rows of distinct ids, likeliest first.  A row with less than ``k`` ids is filled up with the lowest
        others, each with an equal share of the tail, as a reader gives it to those that are not there.
        With the same tokenizer, the same tokens and the same ``k``, the client's rows as they are.

    Raises:
        ValueError: Texts differ, rows are no distributions or about no token, or a size does not fit.
        Memory: about 100 bytes for each of ``N k`` entries.
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
    return collect(projector.said, len(student), kept, size, threshold)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The ``m`` tokens of a reading that stand for text: each begins where the one before it ends."""

    index: Ints
    """``[m]``, which tokens they are."""
    ids: Ints
    starts: Ints
    """``[m]``, with the white space before that no token reads."""
    reads: Ints
    """``[m]``, without it."""
    ends: Ints
    bare: Mask
    faithful: Mask

    @staticmethod
    def of(reading: Reading, eos_id: int | None) -> "_Tokens":
        """An end of the text stands for one byte behind it."""
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
    """The student's tokens that the client has a row for, ``P`` places, and what has been said of each."""

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
        there = np.flatnonzero(last < len(self.theirs.ends))
        a = first[there]
        there = there[(self.row[a] >= 0) & self.theirs.faithful[a]]
        self.first, self.last = first[there], last[there]
        self.begin, self.reads = ours.starts[there], ours.reads[there]
        self.target, self.bare = ours.ids[there], ours.bare[there]
        eos = self.target == (-1 if mapped.student.eos_id is None else mapped.student.eos_id)
        self.sure = eos | (mapped.student.strings.lengths[self.target] > 0)
        """``[P]``, whose own piece is known: not where the student reads an unknown token."""
        self.weight = np.ones(len(there))
        self.said = Said(ours.index[there], 1 - self.tails[self.row[self.first]], np.zeros(len(there)))
        self.joiner = Joiner(Strings([student.text]), mapped.client, mapped.student)
        self.in_word = (
            _ends_of_word_characters(student.text)
            if WORDPIECE in (mapped.client.kind, mapped.student.kind)
            else np.zeros(len(student.text) + 2, np.bool_)
        )

    def descend(self, depth: int) -> None:
        """Say what the row of the client's token ``first + depth`` says, of the mass that has got there."""
        places = np.flatnonzero((self.weight > 0) & (self.first + depth <= self.last))
        token = self.first[places] + depth
        dumb = (self.row[token] < 0) | ~self.theirs.faithful[token]
        self.said.tail[places[dumb]] += self.weight[places[dumb]]
        self.weight[places[dumb]] = 0
        places, token = places[~dumb], token[~dumb]
        row = self.row[token]
        ids, mass, rest = self.ids[row], self.probs[row].copy(), self.tails[row].copy()
        base, skip = self._cores(token, ids)
        begin = self.begin[places][:, None]
        inner = self.begin[places] > self.theirs.starts[token]
        unknown = np.zeros(ids.shape, np.bool_)
        if inner.any():
            unknown[inner] = self._condition(begin, base, skip, ids, mass, rest, inner)
        mass *= self.weight[places, None]
        self.said.tail[places] += rest * self.weight[places]
        target = self._targets(depth, places, token, ids, base, skip, unknown, mass)
        is_text = ids == self.theirs.ids[token][:, None]
        last = token == self.last[places]
        row_index, column = np.nonzero(is_text & (last & self.sure[places])[:, None])
        target[row_index, column] = self.target[places][row_index]
        self.weight[places] = np.where(last, 0.0, np.where(is_text, mass, 0.0).sum(1))
        mass[is_text & ~last[:, None]] = 0
        target[unknown] = NOWHERE
        self.said.parts.append((np.repeat(places, ids.shape[1]), target.ravel(), mass.ravel()))

    def _cores(self, token: Ints, ids: Ints) -> tuple[Ints, Ints]:
        """``[A, k]``: where in the text a token's bytes would begin, and how many of them are a space that
        the text has in its own way: as other white space, or not at all."""
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
        """Divide inner rows of ``mass`` and ``rest`` by what may agree with the text before ``begin``; in
        return, what agrees and ends there or sooner, so that it is not known how it goes on."""
        which, lengths = self._known(ids[inner])
        end = np.repeat(begin[inner], ids.shape[1], axis=1)
        flat = [array.ravel() for array in (base[inner], end, which, skip[inner])]
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
        """Ids that the tokenizer has, and how many bytes they stand for; of others, none."""
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
            # One byte of white space that is skipped and read again: taken for a space.
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
        # An id without bytes adds none: what stands before it is said.
        none = ids[rows, columns] >= len(self.mapped.client)
        found = self.joiner.first_pieces(first, end, lead, which, np.where(lengths > 0, leave, 0))
        target[rows, columns] = np.where(none, NOWHERE, found)
        return target

    def _odd_space(self, begin: Ints) -> Mask:
        """Whether the byte there is no space."""
        text = np.frombuffer(self.text + b" ", np.uint8)
        return np.asarray(text[np.minimum(begin, len(self.text))] != ord(" "))

    def _mapped(self, places: Ints, ids: Ints, stripped: Mask) -> Ints:
        """By the map of whole tokens: with their own space, without, or with one more."""
        mapped = self.mapped
        which = np.minimum(ids, len(mapped.client) - 1)
        if mapped.student.kind == BYTES:
            lead = np.zeros(ids.shape, np.bool_)
        elif mapped.student.kind == METASPACE:
            lead = np.repeat(self.bare[places][:, None], ids.shape[1], axis=1)
        else:
            lead = ~(self.in_word[self.begin[places]][:, None] & mapped.client.word[which])
        found = mapped.plain[which].astype(np.int64)
        if stripped.any():
            found = np.where(stripped & ~lead, mapped.bare[which], found)
        if lead.any():
            found = np.where(lead & ~stripped, mapped.spaced[which], found)
        return np.where(ids < len(mapped.client), found, NOWHERE)


def _ends_of_word_characters(text: bytes) -> Mask:
    """``[B + 2]``, whether a character that can go on a word ends before that byte."""
    found = np.zeros(len(text) + 2, np.bool_)
    place = 0
    for character in text.decode():
        place += len(character.encode())
        found[place] = is_word_character(character)
    return found
