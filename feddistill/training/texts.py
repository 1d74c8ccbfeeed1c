"""Labelled and distilled texts, and their loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from feddistill.config.training import DistillConfig
from feddistill.modelio.padding import Tokens
from feddistill.store.logit_files import Chained, TensorFile
from feddistill.types import NO_LABEL
from feddistill_kernels import distillation_loss


@dataclass(frozen=True, slots=True)
class TrainingExamples:
    """``N`` texts, each with a label, a teacher's prediction, or both."""

    tokens: Sequence[Tokens]
    """Token ids of each text."""
    labels: Tensor
    """``[N]`` int64; ``NO_LABEL`` for texts without a label."""
    teacher: Tensor | TensorFile | Chained | None = None
    """``[N, V]`` log-probabilities; ``None`` without a teacher."""
    distill_mask: Tensor | None = None
    """``[N]`` bool, True for rows that learn from ``teacher``; ``None`` for all of them."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.labels), "a label, or NO_LABEL, for each text"
        assert self.teacher is None or len(self.teacher) == len(self.labels), "a prediction for each text"


def example_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    distill_mask: Tensor | None,
    distill: DistillConfig | None,
) -> Tensor:
    """Sum over a batch of ``w T^2 D(teacher, student) + (1 - w) CE``, a scalar.

    ``w`` is ``distill.kd_weight`` for rows with both a teacher and a label, 1 for rows with only a teacher
    and 0 for rows with only a label. Rows with neither add nothing. Without any teacher the loss is
    cross-entropy.
    """
    if teacher is None:
        return functional.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="sum")
    assert distill is not None, "a teacher needs a distillation loss"
    kd_rows = torch.where(labels == NO_LABEL, 1.0, distill.kd_weight)
    if distill_mask is not None:
        kd_rows = torch.where(distill_mask, kd_rows, 0.0)
    if distill.kind == "mae":
        difference = _centred(logits.float()) - _centred(teacher)
        divergence = (kd_rows * difference.abs().mean(-1)).sum()
    else:
        divergence = distillation_loss(
            logits,
            teacher,
            kind=distill.kind,
            beta=distill.beta,
            temperature=distill.temperature,
            row_weight=kd_rows,
            reduction="sum",
        )
    ce = functional.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="none")
    return divergence + ((1.0 - kd_rows) * ce).sum()


def _centred(scores: Tensor) -> Tensor:
    """Scores minus their mean: logits and log-probabilities differ by a constant per row, removed here."""
    return scores - scores.mean(-1, keepdim=True)
