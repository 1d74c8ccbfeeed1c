"""Train a model on texts with labels, with a teacher's answers, or both.

The loop is ``transformers.Trainer``; what is ours is the loss, here, and what a batch carries (``trainer``).
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from feddistill.accounting import FlopMeter
from feddistill.config.training import DistillConfig, TrainingConfig
from feddistill.heads import takes_types
from feddistill.tensorfile import Chained, TensorFile
from feddistill.training.blocks import BlockLessons, Hiding
from feddistill.training.questions import QuestionLessons
from feddistill.types import NO_LABEL as NO_LABEL
from feddistill.types import Tick
from feddistill_kernels import distillation_loss


@dataclass(frozen=True, slots=True)
class Lessons:
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


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training went."""

    steps: int
    loss: float
    """Mean over the last tenth of the steps."""
    loss_curve: tuple[tuple[int, float], ...]
    """``(step, loss)``, at most fifty points."""


def lesson_loss(
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


def steps_of(config: TrainingConfig, examples: int) -> int:
    """Optimiser steps that ``config`` takes over ``examples`` texts."""
    batches = -(-examples // config.batch_size)
    return max(1, round(config.epochs * batches / config.gradient_accumulation))


def fit(
    model: nn.Module,
    lessons: Lessons | BlockLessons | QuestionLessons,
    config: TrainingConfig,
    *,
    seed: int,
    bf16: bool,
    pad_id: int,
    head: set[str],
    meter: FlopMeter,
    steps: int | None = None,
    distill: DistillConfig | None = None,
    proximal: float = 0.0,
    vocab_size: int = 0,
    hiding: Hiding | None = None,
    tick: Tick | None = None,
) -> Trained:
    """Train ``model`` in place.

    Args:
        model: Takes ``input_ids`` and ``attention_mask``, returns ``.logits [B, V]``; of blocks one of
            transformers' language models, of questions one for question answering.
        lessons: What to learn.
        config: Optimiser and schedule.
        seed: Of the order of texts and of dropout.
        bf16: Whether passes run in bfloat16 (weights stay float32).
        pad_id: What shorter texts are filled with.
        head: Names of the parameters that take ``config.head_learning_rate``.
        meter: Counts the operations.
        steps: Optimiser steps; ``None`` for ``config.epochs``.
        distill: The loss, where lessons have a teacher.
        proximal: Adds ``proximal / 2 * |w - w_0|**2`` to the loss, ``w_0`` the weights as they are now
            (FedProx: Li et al., MLSys 2020, equation 2).
        vocab_size: Of blocks: ``V``.
        hiding: Of blocks: how tokens are hidden from a masked model; ``None`` for a causal one.
        tick: Told of every step.
    """
    from feddistill.training import trainer  # 100 MB: a server that only merges answers does without

    total = steps or steps_of(config, len(lessons.tokens))
    batch_loss: trainer.BatchLoss
    if isinstance(lessons, Lessons):
        batch_loss = trainer.TextLoss(lessons, distill)
    elif isinstance(lessons, QuestionLessons):
        batch_loss = trainer.QuestionLoss(lessons, distill, takes_types(model))
    elif hiding is None:
        batch_loss = trainer.BlockLoss(lessons, distill, vocab_size, bf16)
    else:
        batch_loss = trainer.MaskedLoss(lessons, distill, vocab_size, bf16, hiding, seed)
    with tempfile.TemporaryDirectory() as scratch:
        loop = trainer.LessonTrainer(
            model,
            lessons.tokens,
            batch_loss,
            trainer.arguments(config, scratch, total, seed=seed, bf16=bf16),
            config,
            pad_id=pad_id,
            head=head,
            meter=meter,
            proximal=proximal,
            tick=tick,
        )
        loop.train()
    curve = [(int(e["step"]), float(e["loss"])) for e in loop.state.log_history if "loss" in e]
    tail = [loss for _, loss in curve[-max(1, len(curve) // 10) :]]
    return Trained(total, sum(tail) / len(tail), tuple(curve))
