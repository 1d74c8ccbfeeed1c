"""Train a model on texts with labels, with a teacher's answers, or both.

The loop is ``transformers.Trainer``; what is ours is the loss and what a batch carries.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from feddistill.accounting import FlopMeter
from feddistill.batches import pad
from feddistill.config.training import DistillConfig, TrainingConfig
from feddistill.types import Tick
from feddistill_kernels import distillation_loss

NO_LABEL = -100
"""torch's own mark of a row without label."""


@dataclass(frozen=True, slots=True)
class Lessons:
    """What is to be learned: ``N`` texts, each with a label, a teacher's answer, or both."""

    tokens: Sequence[Sequence[int]]
    """Token ids of each text."""
    labels: Tensor
    """``[N]`` int64; ``NO_LABEL`` where there is none."""
    teacher: Tensor | None = None
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


def in_batches(lengths: list[int], batch_size: int, order: torch.Generator) -> LengthGroupedSampler:
    """Rows in the order of an epoch: texts of about one length share a batch."""
    return LengthGroupedSampler(batch_size, lengths=lengths, generator=order)


def fit(
    model: nn.Module,
    lessons: Lessons,
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
    tick: Tick | None = None,
) -> Trained:
    """Train ``model`` in place.

    Args:
        model: Takes ``input_ids`` and ``attention_mask``, returns ``.logits [B, V]``.
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
        tick: Told of every step.
    """
    total = steps or steps_of(config, len(lessons.tokens))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=total,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.schedule,
            warmup_steps=int(config.warmup_ratio * total),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=max(1, total // 50),
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = _LessonTrainer(
            model=model,
            args=arguments,
            train_dataset=_Rows(lessons.tokens),
            data_collator=_Padding(pad_id),
            callbacks=[_Ticker(tick)] if tick else None,
        )
        trainer.remove_callback(PrinterCallback)  # its lines of numbers; ours go to the records
        trainer.teach(lessons, config, distill, head, meter, proximal)
        trainer.train()
    curve = [(int(e["step"]), float(e["loss"])) for e in trainer.state.log_history if "loss" in e]
    tail = [loss for _, loss in curve[-max(1, len(curve) // 10) :]]
    return Trained(total, sum(tail) / len(tail), tuple(curve))


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self, tokens: Sequence[Sequence[int]]):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"row": row, "input_ids": self.tokens[row]}


class _Padding:
    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad([example["input_ids"] for example in examples], self.pad_id)
        rows = torch.tensor([example["row"] for example in examples])
        return {"input_ids": ids, "attention_mask": mask, "rows": rows}


class _Ticker(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, tick: Tick):
        self.tick = tick

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tick(state.global_step, state.max_steps)


class _LessonTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    def teach(
        self,
        lessons: Lessons,
        config: TrainingConfig,
        distill: DistillConfig | None,
        head: set[str],
        meter: FlopMeter,
        proximal: float,
    ) -> None:
        device = self.args.device
        self.lessons, self.config, self.distill, self.head, self.meter = lessons, config, distill, head, meter
        self.optimizer: torch.optim.Optimizer | None
        self.labels = lessons.labels.to(device)
        self.teacher = None if lessons.teacher is None else lessons.teacher.to(device)
        self.taught = None if lessons.taught is None else lessons.taught.to(device)
        self.proximal = proximal
        self.start = [p.detach().clone() for p in self._trained()] if proximal else []
        self.model_accepts_loss_kwargs = False  # our loss is a mean: Trainer divides by accumulated batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        rows = inputs["rows"]
        teacher = None if self.teacher is None else self.teacher[rows]
        taught = None if self.taught is None else self.taught[rows]
        loss = lesson_loss(outputs.logits, self.labels[rows], teacher, taught, self.distill)
        for now, then in zip(self._trained(), self.start, strict=False):
            loss = loss + 0.5 * self.proximal * (now - then).square().sum()
        self.meter.add(*inputs["input_ids"].shape, training=True)
        return (loss, outputs) if return_outputs else loss

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def create_optimizer(self, *_: Any) -> Any:
        if self.optimizer is None:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            rate = self.config.learning_rate
            groups = [
                {"params": [p for n, p in trained if n not in self.head], "lr": rate},
                {
                    "params": [p for n, p in trained if n in self.head],
                    "lr": self.config.head_learning_rate or rate,
                },
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], weight_decay=self.config.weight_decay
            )
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> LengthGroupedSampler:
        order = torch.Generator().manual_seed(self.args.seed)
        return in_batches([len(t) for t in self.lessons.tokens], self.config.batch_size, order)
