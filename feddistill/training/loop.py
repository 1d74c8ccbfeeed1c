"""Train a model on texts with labels, with a teacher's answers, or both.

The loop is ``transformers.Trainer``; what is ours is the loss, here, and what a batch carries (``trainer``).
"""

import tempfile
from dataclasses import dataclass

from torch import nn

from feddistill.accounting import FlopMeter
from feddistill.config.training import DistillConfig, TrainingConfig
from feddistill.modelio.outputs import takes_types
from feddistill.training.blocks import BlockExamples, Masking
from feddistill.training.spans import SpanExamples
from feddistill.training.texts import TrainingExamples
from feddistill.types import NO_LABEL as NO_LABEL
from feddistill.types import ProgressCallback


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training went."""

    steps: int
    loss: float
    """Mean over the last tenth of the steps."""
    loss_curve: tuple[tuple[int, float], ...]
    """``(step, loss)``, at most fifty points."""


def steps_of(config: TrainingConfig, examples: int) -> int:
    """Optimiser steps that ``config`` takes over ``examples`` texts."""
    batches = -(-examples // config.batch_size)
    return max(1, round(config.epochs * batches / config.gradient_accumulation))


def fit(
    model: nn.Module,
    lessons: TrainingExamples | BlockExamples | SpanExamples,
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
    masking: Masking | None = None,
    on_step: ProgressCallback | None = None,
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
    if isinstance(lessons, TrainingExamples):
        batch_loss = trainer.TextLoss(lessons, distill)
    elif isinstance(lessons, SpanExamples):
        batch_loss = trainer.QuestionLoss(lessons, distill, takes_types(model))
    elif masking is None:
        batch_loss = trainer.BlockLoss(lessons, distill, vocab_size, bf16)
    else:
        batch_loss = trainer.MaskedLoss(lessons, distill, vocab_size, bf16, masking, seed)
    with tempfile.TemporaryDirectory() as scratch:
        loop = trainer.ExampleTrainer(
            model,
            lessons.tokens,
            batch_loss,
            trainer.arguments(config, scratch, total, seed=seed, bf16=bf16),
            config,
            pad_id=pad_id,
            head=head,
            meter=meter,
            proximal=proximal,
            on_step=on_step,
        )
        loop.train()
    curve = [(int(e["step"]), float(e["loss"])) for e in loop.state.log_history if "loss" in e]
    tail = [loss for _, loss in curve[-max(1, len(curve) // 10) :]]
    return Trained(total, sum(tail) / len(tail), tuple(curve))
