"""Train a model on texts with labels, with a teacher's predictions, or both.

The loop is ``transformers.Trainer``; the losses and the batches are ours (``training.trainer``).
"""

import tempfile
from dataclasses import dataclass

from torch import nn

from feddistill.accounting import FlopMeter
from feddistill.config.training import TrainingConfig
from feddistill.training.losses import BatchLoss, Examples
from feddistill.types import ProgressCallback


@dataclass(frozen=True, slots=True)
class Trained:
    """Outcome of a training."""

    steps: int
    loss: float
    """Mean over the last tenth of the steps."""
    loss_curve: tuple[tuple[int, float], ...]
    """``(step, loss)``, at most fifty points."""


def steps_of(config: TrainingConfig, examples: int) -> int:
    """Number of optimiser steps of ``config.epochs`` over ``examples`` texts."""
    batches = -(-examples // config.batch_size)
    return max(1, round(config.epochs * batches / config.gradient_accumulation))


def fit(
    model: nn.Module,
    examples: Examples,
    config: TrainingConfig,
    *,
    loss: BatchLoss,
    seed: int,
    bf16: bool,
    pad_id: int,
    head: set[str],
    meter: FlopMeter,
    steps: int | None = None,
    proximal: float = 0.0,
    on_step: ProgressCallback | None = None,
) -> Trained:
    """Train ``model`` in place.

    Args:
        model: Takes ``input_ids`` and ``attention_mask`` and returns ``.logits [B, V]``; for blocks one of
            transformers' language models, for questions one for question answering.
        examples: The training set.
        config: Optimiser and schedule.
        loss: Of a batch of examples.
        seed: For the order of texts and dropout.
        bf16: True to run passes in bfloat16 (weights stay float32).
        pad_id: Fills texts that are shorter than others in the batch.
        head: Names of the parameters that take ``config.head_learning_rate``.
        meter: Counts the operations.
        steps: Optimiser steps; ``None`` for ``config.epochs``.
        proximal: Adds ``proximal / 2 * |w - w_0|**2`` to the loss, ``w_0`` the weights at the start
            (FedProx: Li et al., MLSys 2020, equation 2).
        on_step: Called after every optimiser step.
    """
    from feddistill.training import trainer  # 100 MB, not needed by a server that only aggregates

    total = steps or steps_of(config, len(examples.tokens))
    with tempfile.TemporaryDirectory() as scratch:
        loop = trainer.ExampleTrainer(
            model,
            examples.tokens,
            loss,
            trainer.arguments(config, scratch, total, seed=seed, bf16=bf16),
            config,
            pad_id=pad_id,
            head=head,
            meter=meter,
            proximal=proximal,
            on_step=on_step,
        )
        loop.train()
    curve = loop.loss_curve()
    tail = [value for _, value in curve[-max(1, len(curve) // 10) :]]
    return Trained(total, sum(tail) / len(tail), tuple(curve))
