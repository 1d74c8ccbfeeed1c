"""What a language model learns: the next tokens, a teacher's answers to some of them, or both.

``B`` blocks, ``R`` rows of all of them, ``V`` vocabulary. The logits of a batch are never all there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddistill.config.training import DistillConfig
from feddistill.modelio.packing import PackedTexts
from feddistill.store.logit_files import Chained, TopKFile
from feddistill.types import NO_LABEL
from feddistill_kernels import TopK, linear_distillation_loss

NOT_TAUGHT = -1
"""In the place of a teacher's row."""


@dataclass(frozen=True, slots=True)
class Masking:
    """How tokens are hidden from a masked model that learns them (Devlin et al., NAACL 2019): of ten that are
    drawn eight are read as ``token``, one as any other, one as it is."""

    token: int
    share: float
    """Of the tokens that are learned."""


@dataclass(frozen=True, slots=True)
class BlockExamples:
    """What is to be learned."""

    tokens: Sequence[NDArray[np.int64]]
    """Of each block."""
    first: NDArray[np.int64]
    """``[B]``, a block's first row: it has one for each token but its last."""
    labels: Tensor
    """``[R]`` next tokens; ``NO_LABEL`` where they are not to be learned."""
    teacher: TopK | TopKFile | Chained | None = None
    """Answers to some rows."""
    taught: Tensor | None = None
    """``[R]``, which row of ``teacher`` answers; ``NOT_TAUGHT`` where none does."""


def examples_of(
    blocks: PackedTexts, teacher: TopK | TopKFile | Chained | None = None, rows: Tensor | None = None
) -> BlockExamples:
    """All of ``blocks``; ``rows`` are those that ``teacher`` answers, in its order."""
    labels = torch.from_numpy(np.where(blocks.wanted, blocks.targets, NO_LABEL))
    first = np.array([blocks.first(b) for b in range(len(blocks))], np.int64)
    taught = None
    if teacher is not None:
        assert rows is not None, "a teacher answers some rows"
        taught = torch.full((blocks.rows,), NOT_TAUGHT)
        taught[rows] = torch.arange(len(rows))
    return BlockExamples([blocks[b] for b in range(len(blocks))], first, labels, teacher, taught)


def some(lessons: BlockExamples, chosen: Sequence[int]) -> BlockExamples:
    """Those blocks of ``lessons``, in that order."""
    spans = [np.arange(lessons.first[b], lessons.first[b] + len(lessons.tokens[b]) - 1) for b in chosen]
    sizes = np.array([len(span) for span in spans])
    rows = torch.from_numpy(np.concatenate(spans))
    return BlockExamples(
        [lessons.tokens[b] for b in chosen],
        np.cumsum(sizes) - sizes,
        lessons.labels[rows],
        lessons.teacher,
        None if lessons.taught is None else lessons.taught[rows],
    )


def hardened(lessons: BlockExamples) -> BlockExamples:
    """The teacher's first choices in the place of the labels of those rows that it answers."""
    assert isinstance(lessons.teacher, TopK), "in memory"
    assert lessons.taught is not None, "which rows it answers"
    first = lessons.teacher.ids.gather(1, lessons.teacher.log_probs.argmax(-1, keepdim=True))[:, 0].long()
    said = (lessons.teacher.log_probs > -torch.inf).any(-1)
    labels, rows = lessons.labels.clone(), (lessons.taught != NOT_TAUGHT).nonzero()[:, 0]
    at = lessons.taught[rows]
    labels[rows[said[at]]] = first[at][said[at]]
    return BlockExamples(lessons.tokens, lessons.first, labels)


def together(own: BlockExamples, more: BlockExamples) -> BlockExamples:
    """Blocks that only have labels, and then those of ``more``."""
    assert own.teacher is None, "one teacher"
    taught = None
    if more.taught is not None:
        taught = torch.cat([torch.full((len(own.labels),), NOT_TAUGHT), more.taught])
    return BlockExamples(
        [*own.tokens, *more.tokens],
        np.concatenate([own.first, more.first + len(own.labels)]),
        torch.cat([own.labels, more.labels]),
        more.teacher,
        taught,
    )


def repeated(lessons: BlockExamples, count: int, answers: int) -> BlockExamples:
    """The same blocks ``count`` times, each time taught by the next ``answers`` rows of the teacher."""
    assert lessons.taught is not None, "which rows are answered"
    taught, rows = lessons.taught, len(lessons.labels)
    return BlockExamples(
        list(lessons.tokens) * count,
        np.concatenate([lessons.first + rows * n for n in range(count)]),
        lessons.labels.repeat(count),
        lessons.teacher,
        torch.cat([torch.where(taught == NOT_TAUGHT, taught, taught + answers * n) for n in range(count)]),
    )


def rows_of(lessons: BlockExamples, blocks: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """Where the rows of these blocks stand in a batch ``[len(blocks) * length]``, and which rows they are."""
    places, rows = [], []
    for at, block in enumerate(blocks):
        steps = torch.arange(len(lessons.tokens[block]) - 1)
        places.append(steps + at * length)
        rows.append(steps + int(lessons.first[block]))
    return torch.cat(places), torch.cat(rows)


def block_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: TopK | None,
    taught: Tensor | None,
    distill: DistillConfig | None,
    vocab_size: int,
) -> Tensor:
    """Mean over rows of ``w T^2 D(teacher, student) + (1 - w) CE``, a scalar.

    ``w`` is ``distill.kd_weight`` where a row has both a teacher and a label, 1 where it has only a teacher
    and 0 where it has only a label; a row with neither is not counted.

    Args:
        hidden: ``[n, H]``.
        weight: ``[V', H]``, ``bias [V']``: the head; rows from ``vocab_size`` on are padding.
        bias: See there.
        labels: ``[n]``.
        teacher: Of the rows in ``taught``, in that order.
        taught: ``[n]`` bool; ``None`` for none.
        distill: The loss, where there is a teacher.
        vocab_size: ``V``.

    Memory: The gradients, and the workspace of ``linear_distillation_loss``.
    """
    labelled = labels != NO_LABEL
    plain = labelled if taught is None else labelled & ~taught
    total = hidden.new_zeros((), dtype=torch.float32)
    if plain.any():
        total = total + _cross_entropy(hidden[plain], weight, bias, labels[plain], vocab_size)
    counted = int(plain.sum())
    if taught is not None and taught.any():
        assert distill is not None, "a teacher needs a distillation loss"
        assert teacher is not None, "rows that are taught have one"
        both, alone = taught & labelled, taught & ~labelled
        for rows, kd_weight in ((both, distill.kd_weight), (alone, 1.0)):
            if rows.any():
                total = total + linear_distillation_loss(
                    hidden[rows],
                    weight,
                    teacher[rows[taught]],
                    labels[rows] if kd_weight < 1 else None,
                    bias=bias,
                    kind=distill.kind,
                    beta=distill.beta,
                    temperature=distill.temperature,
                    kd_weight=kd_weight,
                    reduction="sum",
                )
        counted += int(taught.sum())
    return total / max(counted, 1)


def _cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocab_size: int
) -> Tensor:
    """The sum, by the kernel that needs no logits: a teacher that does not count knows the label."""
    known = TopK(
        labels[:, None].int(),
        torch.zeros(len(labels), 1, device=labels.device),
        torch.full((len(labels),), -torch.inf, device=labels.device),
        vocab_size,
    )
    return linear_distillation_loss(hidden, weight, known, labels, bias=bias, kd_weight=0.0, reduction="sum")
