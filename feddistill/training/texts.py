"""Labelled and distilled texts, and their loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from feddistill.config.training import DistillConfig
from feddistill.store.logit_files import Chained, TensorFile
from feddistill.types import NO_LABEL as NO_LABEL
from feddistill_kernels import distillation_loss


@dataclass(frozen=True, slots=True)
class TrainingExamples:
    """What is to be learned: ``N`` texts, each with a label, a teacher's answer, or both."""

    tokens: Sequence[Sequence[int]]
    """Token ids of each text."""
    labels: Tensor
    """``[N]`` int64; ``NO_LABEL`` where there is none."""
    teacher: Tensor | TensorFile | Chained | None = None
    """``[N, V]`` log-probabilities; ``None`` when there is no teacher."""
    taught: Tensor | None = None
    """``[N]`` bool, which rows of ``teacher`` count; ``None`` for all of them."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.labels), "a label, or NO_LABEL, for each text"
        assert self.teacher is None or len(self.teacher) == len(self.labels), "an answer for each text"


def example_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    taught: Tensor | None,
    distill: DistillConfig | None,
) -> Tensor:
    """Mean over a batch of ``w T^2 D(teacher, student) + (1 - w) CE``, a scalar.

    ``w`` is ``distill.kd_weight`` where a row has both a teacher and a label, 1 where it has only a
    teacher and 0 where it has only a label. Without any teacher the loss is cross-entropy.
    """
    if teacher is None:
        return functional.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL)
    assert distill is not None, "a teacher needs a distillation loss"
    kd_rows = torch.where(labels == NO_LABEL, 1.0, distill.kd_weight)
    if taught is not None:
        kd_rows = torch.where(taught, kd_rows, 0.0)
    if distill.kind == "mae":
        apart = _centred(logits.float()) - _centred(teacher)
        divergence = (kd_rows * apart.abs().mean(-1)).sum()
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
    return (divergence + ((1.0 - kd_rows) * ce).sum()) / len(labels)


def _centred(scores: Tensor) -> Tensor:
    """Logits are defined up to a constant a row, and log-probabilities are logits: both alike from here."""
    return scores - scores.mean(-1, keepdim=True)
