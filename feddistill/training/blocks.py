"""Training examples of a language model: next tokens, a teacher's predictions of some of them, or both.

``B`` blocks with ``R`` rows altogether, ``V`` vocabulary. The logits of a batch are never all in memory.
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

NO_TEACHER = -1
"""Marks a row that the teacher does not predict."""


@dataclass(frozen=True, slots=True)
class Masking:
    """How tokens are masked in training (Devlin et al., NAACL 2019): of ten that are drawn, eight are
    replaced by ``token``, one by a random token, and one stays."""

    token: int
    share: float
    """Share of the tokens in the loss that are drawn."""


@dataclass(frozen=True, slots=True)
class BlockExamples:
    """``B`` blocks, each row with a next token, a teacher's prediction, or both."""

    tokens: Sequence[NDArray[np.int64]]
    """Token ids of each block."""
    first: NDArray[np.int64]
    """``[B]``, first row of each block, which has one row for each token but its last."""
    labels: Tensor
    """``[R]`` next tokens; ``NO_LABEL`` for tokens outside the loss."""
    teacher: TopK | TopKFile | Chained | None = None
    """Predictions of some rows."""
    teacher_rows: Tensor | None = None
    """``[R]``, index of each row's prediction in ``teacher``; ``NO_TEACHER`` without one."""


def examples_of(
    blocks: PackedTexts, teacher: TopK | TopKFile | Chained | None = None, rows: Tensor | None = None
) -> BlockExamples:
    """All of ``blocks``; ``rows`` are those that ``teacher`` predicts, in its order."""
    labels = torch.from_numpy(np.where(blocks.loss_mask, blocks.targets, NO_LABEL))
    first = np.array([blocks.first(b) for b in range(len(blocks))], np.int64)
    teacher_rows = None
    if teacher is not None:
        assert rows is not None, "the rows that the teacher predicts"
        teacher_rows = torch.full((blocks.rows,), NO_TEACHER)
        teacher_rows[rows] = torch.arange(len(rows))
    return BlockExamples([blocks[b] for b in range(len(blocks))], first, labels, teacher, teacher_rows)


def select(examples: BlockExamples, chosen: Sequence[int]) -> BlockExamples:
    """The blocks ``chosen`` of ``examples``, in that order."""
    spans = [np.arange(examples.first[b], examples.first[b] + len(examples.tokens[b]) - 1) for b in chosen]
    sizes = np.array([len(span) for span in spans])
    rows = torch.from_numpy(np.concatenate(spans))
    return BlockExamples(
        [examples.tokens[b] for b in chosen],
        np.cumsum(sizes) - sizes,
        examples.labels[rows],
        examples.teacher,
        None if examples.teacher_rows is None else examples.teacher_rows[rows],
    )


def with_hard_targets(examples: BlockExamples) -> BlockExamples:
    """Replace the labels of rows that the teacher predicts by its likeliest tokens."""
    assert isinstance(examples.teacher, TopK), "in memory"
    assert examples.teacher_rows is not None, "which rows the teacher predicts"
    likeliest = examples.teacher.log_probs.argmax(-1, keepdim=True)
    tokens = examples.teacher.ids.gather(1, likeliest)[:, 0].long()
    predicted = (examples.teacher.log_probs > -torch.inf).any(-1)  # False where the teacher abstains
    labels, rows = examples.labels.clone(), (examples.teacher_rows != NO_TEACHER).nonzero()[:, 0]
    index = examples.teacher_rows[rows]
    labels[rows[predicted[index]]] = tokens[index][predicted[index]]
    return BlockExamples(examples.tokens, examples.first, labels)


def concatenate(own: BlockExamples, more: BlockExamples) -> BlockExamples:
    """Blocks with labels alone, then those of ``more``."""
    assert own.teacher is None, "only the second has a teacher"
    teacher_rows = None
    if more.teacher_rows is not None:
        teacher_rows = torch.cat([torch.full((len(own.labels),), NO_TEACHER), more.teacher_rows])
    return BlockExamples(
        [*own.tokens, *more.tokens],
        np.concatenate([own.first, more.first + len(own.labels)]),
        torch.cat([own.labels, more.labels]),
        more.teacher,
        teacher_rows,
    )


def repeated(examples: BlockExamples, count: int, predictions: int) -> BlockExamples:
    """The blocks ``count`` times, each time with the next ``predictions`` rows of the teacher."""
    assert examples.teacher_rows is not None, "which rows the teacher predicts"
    first, rows = examples.teacher_rows, len(examples.labels)
    shifted = [torch.where(first == NO_TEACHER, first, first + predictions * n) for n in range(count)]
    return BlockExamples(
        list(examples.tokens) * count,
        np.concatenate([examples.first + rows * n for n in range(count)]),
        examples.labels.repeat(count),
        examples.teacher,
        torch.cat(shifted),
    )


def rows_of(examples: BlockExamples, blocks: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """Positions of the rows of ``blocks`` in a batch ``[len(blocks) * length]``, and the rows themselves."""
    positions, rows = [], []
    for index, block in enumerate(blocks):
        steps = torch.arange(len(examples.tokens[block]) - 1)
        positions.append(steps + index * length)
        rows.append(steps + int(examples.first[block]))
    return torch.cat(positions), torch.cat(rows)


def block_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: TopK | None,
    distill_mask: Tensor | None,
    distill: DistillConfig | None,
    vocab_size: int,
) -> Tensor:
    """Sum over rows of ``w T^2 D(teacher, student) + (1 - w) CE``, a scalar.

    ``w`` is ``distill.kd_weight`` for rows with both a teacher and a label, 1 for rows with only a teacher
    and 0 for rows with only a label; rows with neither add nothing.

    Args:
        hidden: ``[n, H]``.
        weight: ``[V', H]``, of the head; rows from ``vocab_size`` on are padding.
        bias: ``[V']``, of the head.
        labels: ``[n]``.
        teacher: Predictions of the rows in ``distill_mask``, in that order.
        distill_mask: ``[n]`` bool, True for rows that learn from ``teacher``; ``None`` for no row.
        distill: The loss; needed with a teacher.
        vocab_size: ``V``.

    Memory: The gradients, and the workspace of ``linear_distillation_loss``.
    """
    labelled = labels != NO_LABEL
    plain = labelled if distill_mask is None else labelled & ~distill_mask
    total = hidden[:0].sum(dtype=torch.float32)  # with a gradient, also if no row is in the loss
    if plain.any():
        total = total + _cross_entropy(hidden[plain], weight, bias, labels[plain], vocab_size)
    if distill_mask is not None and distill_mask.any():
        assert distill is not None, "a teacher needs a distillation loss"
        assert teacher is not None, "rows of the mask have predictions"
        both, alone = distill_mask & labelled, distill_mask & ~labelled
        for rows, kd_weight in ((both, distill.kd_weight), (alone, 1.0)):
            if rows.any():
                total = total + linear_distillation_loss(
                    hidden[rows],
                    weight,
                    teacher[rows[distill_mask]],
                    labels[rows] if kd_weight < 1 else None,
                    bias=bias,
                    kind=distill.kind,
                    beta=distill.beta,
                    temperature=distill.temperature,
                    kd_weight=kd_weight,
                    reduction="sum",
                )
    return total


def _cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocab_size: int
) -> Tensor:
    """The sum, by the kernel that makes no logits: with weight 0, of a teacher that is the label."""
    one_hot = TopK(
        labels[:, None].int(),
        torch.zeros(len(labels), 1, device=labels.device),
        torch.full((len(labels),), -torch.inf, device=labels.device),
        vocab_size,
    )
    return linear_distillation_loss(
        hidden, weight, one_hot, labels, bias=bias, kd_weight=0.0, reduction="sum"
    )
