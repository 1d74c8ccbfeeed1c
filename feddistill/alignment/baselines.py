"""Alignment methods of others, for comparison: MinED (FuseLLM, FedMKT) and ULD."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from feddistill.alignment.rows import ProjectedMass, Projection, collect, row_of_each
from feddistill.alignment.spans import Reading
from feddistill.alignment.strings import Ints
from feddistill.alignment.vocabulary import Vocabulary
from feddistill.alignment.vocabulary_map import NOWHERE, Ids
from feddistill_kernels import TopK


def edit_distances(string: bytes, others: NDArray[np.uint8]) -> Ints:
    """Levenshtein distances ``[n]`` of a string to ``n`` others of one length, ``[n, length]`` bytes.

    >>> edit_distances(b"kitten", np.frombuffer(b"mittenkettle", np.uint8).reshape(2, 6))
    array([1, 3])
    """
    letters, steps = np.frombuffer(string, np.uint8), np.arange(len(string) + 1, dtype=np.int16)
    row = np.repeat(steps[None], len(others), axis=0)
    for place in range(others.shape[1]):
        changed = row[:, :-1] + (letters != others[:, place, None])
        row += 1
        np.minimum(row[:, 1:], changed, out=row[:, 1:])
        # An insertion costs one per step: subtract the steps, take the running minimum, add them again.
        row = np.minimum.accumulate(row - steps, axis=1) + steps
    return row[:, -1].astype(np.int64)


def mined_map(client: Vocabulary, student: Vocabulary, ids: Sequence[int] | None = None) -> Ids:
    """Map each of the client's ids to the student's id of least edit distance in bytes; ties: the lowest.

    FedMKT's vocabulary mapping (Fan et al. 2024, MinED).  Exact; lengths that cannot be nearer than the best
    so far are skipped.  Takes minutes for two vocabularies of 50,000.

    Args:
        client: Vocabulary of the predicting model.
        student: Vocabulary of the learning model.
        ids: Map only these; ``None``: all.

    Returns:
        ``[V]``, -1 for ids without bytes and ids outside ``ids``.
    """
    nearest = np.full(len(client), NOWHERE, np.int32)
    buckets = _by_length(student)
    for number in range(len(client)) if ids is None else ids:
        token = client.tokens[number]
        if token is None:
            continue
        exact = student.by_bytes.get(token)
        nearest[number] = _nearest(token, buckets) if exact is None else exact
    return nearest


def _by_length(vocabulary: Vocabulary) -> dict[int, tuple[Ints, NDArray[np.uint8]]]:
    """Ids ``[n]`` and bytes ``[n, length]`` of each length."""
    strings = vocabulary.strings
    buckets = {}
    for length in np.unique(strings.lengths[strings.lengths > 0]).tolist():
        numbers = np.flatnonzero(strings.lengths == length)
        buckets[length] = numbers, strings.flat[strings.starts[numbers][:, None] + np.arange(length)]
    return buckets


def _nearest(token: bytes, buckets: dict[int, tuple[Ints, NDArray[np.uint8]]]) -> int:
    best, nearest = 1 << 30, NOWHERE
    for length in sorted(buckets, key=lambda n: abs(n - len(token))):
        if abs(length - len(token)) > best:
            break
        numbers, letters = buckets[length]
        distances = edit_distances(token, letters)
        place = int(distances.argmin())  # the first of several, and so the lowest id
        if (distances[place], numbers[place]) < (best, nearest):
            best, nearest = int(distances[place]), int(numbers[place])
    return nearest


def align(client: Sequence[bytes], student: Sequence[bytes]) -> list[tuple[int, int]]:
    """The path of least total edit distance through two sequences of tokens (dynamic time warping).

    FuseLLM (Wan et al. 2024) and FedMKT.  Time and memory are proportional to the product of the lengths.

    >>> align([b"utter", b"ly"], [b"utte", b"r", b"ly"])
    [(0, 0), (1, 1), (1, 2)]
    """
    if not client or not student:
        return []
    total = _costs(client, student)
    rows, columns = total.shape
    for diagonal in range(1, rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        before = np.full((3, len(i)), np.iinfo(np.int32).max, np.int32)
        for n, (a, b) in enumerate(((i - 1, j - 1), (i - 1, j), (i, j - 1))):
            inside = (a >= 0) & (b >= 0)
            before[n, inside] = total[a[inside], b[inside]]
        total[i, j] += before.min(0)
    row, column = rows - 1, columns - 1
    path = [(row, column)]
    while row or column:
        steps = [(row - 1, column - 1), (row - 1, column), (row, column - 1)]
        row, column = min((step for step in steps if min(step) >= 0), key=lambda step: int(total[step]))
        path.append((row, column))
    return path[::-1]


def _costs(client: Sequence[bytes], student: Sequence[bytes]) -> NDArray[np.int32]:
    ours = list(dict.fromkeys(student))
    place = {token: n for n, token in enumerate(ours)}
    columns = np.array([place[token] for token in student])
    lengths = np.array([len(token) for token in ours])
    groups = []
    for length in np.unique(lengths):
        where = np.flatnonzero(lengths == length)
        letters = np.frombuffer(b"".join(ours[n] for n in where), np.uint8).reshape(len(where), length)
        groups.append((where, letters))
    known: dict[bytes, NDArray[np.int32]] = {}
    costs = np.empty((len(client), len(student)), np.int32)
    for n, token in enumerate(client):
        if token not in known:
            row = np.empty(len(ours), np.int32)
            for where, letters in groups:
                row[where] = edit_distances(token, letters)
            known[token] = row[columns]
        costs[n] = known[token]
    return costs


def mined_project(
    answers: TopK,
    client: Reading,
    student: Reading,
    mapped: Ids,
    vocabularies: tuple[Vocabulary, Vocabulary],
    *,
    predicted: NDArray[np.integer] | None = None,
    k: int | None = None,
    vocab_size: int | None = None,
) -> Projection:
    """FedMKT's projection: ``align`` the tokens, then map the ids; unmatched tokens get a one-hot row.

    A student's token that is aligned with exactly one of the client's, which the map takes to it, gets that
    token's row with its ids mapped.  Every other one gets a row with the text's own token at probability one,
    also if no row predicts the client's token.  Tokens that the tokenizer adds to a text have no row.

    Args:
        answers: ``N`` rows over the client's vocabulary.
        client: The text as the client reads it.
        student: The same text as the student reads it.
        mapped: ``mined_map``.
        vocabularies: The client's and the student's.
        predicted: ``[N]``, the client's token that each row predicts; ``None`` if there is one row for each
            token, in order.
        k: Entries per row; the client's by default.
        vocab_size: Of the student's model, if it is larger than its tokenizer's.

    Raises:
        ValueError: Rows predict no token.
    """
    row_of = row_of_each(answers, client, predicted)
    theirs, ours = np.flatnonzero(~client.added), np.flatnonzero(~student.added)
    their_tokens = [vocabularies[0].tokens[n] or b"" for n in client.ids[theirs].tolist()]
    our_tokens = [vocabularies[1].tokens[n] or b"" for n in student.ids[ours].tolist()]
    partners: list[list[int]] = [[] for _ in ours]
    for i, j in align(their_tokens, our_tokens):
        partners[j].append(i)
    token = np.array([theirs[one[0]] if len(one) == 1 else -1 for one in partners], np.int64)
    target = student.ids[ours].astype(np.int64)
    row = np.where(token >= 0, row_of[token], -1)
    fits = (row >= 0) & (mapped[client.ids[token]] == target)
    ids = answers.ids.cpu().numpy()
    mass = answers.log_probs.double().exp().cpu().numpy()
    rest = answers.log_tail.double().exp().cpu().numpy()
    projected = ProjectedMass(ours, np.where(fits, 1 - rest[row], 1.0), np.where(fits, rest[row], 0.0))
    index, other = np.flatnonzero(fits), np.flatnonzero(~fits)
    known = np.minimum(ids[row[index]], len(mapped) - 1)
    goes = np.where(ids[row[index]] < len(mapped), mapped[known], NOWHERE).astype(np.int64)
    projected.parts.append((np.repeat(index, ids.shape[1]), goes.ravel(), mass[row[index]].ravel()))
    projected.parts.append((other, target[other], np.ones(len(other))))
    size = len(vocabularies[1]) if vocab_size is None else vocab_size
    return collect(projected, len(student), ids.shape[1] if k is None else k, size, 0.0)


def uld_loss(student_logits: Tensor, teacher: TopK) -> Tensor:
    """Universal logit distillation: the mean over rows of ``sum_i |p_(i) - q_(i)|``, probabilities sorted.

    The Wasserstein distance of two distributions whose ids are not matched (Boizard et al. 2024): it compares
    how certain teacher and student are, not of what.  Rows are compared in order: row ``n`` of each is about
    the ``n``-th token of its own tokenizer, wherever that is in the text.

    Args:
        student_logits: Floating ``[N, V]``, with a gradient.
        teacher: ``N`` rows over any vocabulary; its tail is spread uniformly.

    Raises:
        ValueError: The numbers of rows differ.

    Memory: Two float32 ``[N, max(V, teacher's)]``.

    >>> logits = torch.tensor([[0.7, 0.3, 1e-9]]).log()
    >>> same = TopK(torch.tensor([[5, 9]], dtype=torch.int32), torch.tensor([[0.3, 0.7]]).log(),
    ...             torch.tensor([-torch.inf]), vocab_size=10)
    >>> round(float(uld_loss(logits, same)), 6)
    0.0
    """
    if len(student_logits) != len(teacher):
        raise ValueError(f"{len(student_logits)} rows of the student, {len(teacher)} of the teacher")
    p = student_logits.float().softmax(-1).sort(-1, descending=True).values
    with torch.no_grad():
        q = teacher.expand().float().exp().sort(-1, descending=True).values.to(p.device)
    width = max(p.shape[1], q.shape[1])
    return (pad(p, (0, width - p.shape[1])) - pad(q, (0, width - q.shape[1]))).abs().sum(-1).mean()
