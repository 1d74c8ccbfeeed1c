"""``transformers.Trainer`` with our losses, and with texts of similar length in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from typing_extensions import override

from feddistill.accounting import FlopMeter
from feddistill.config.training import TrainingConfig
from feddistill.modelio.padding import Tokens, pad
from feddistill.modelio.padding import inputs as inputs_of
from feddistill.training.losses import Batch, BatchLoss, Terms
from feddistill.types import ProgressCallback


def in_batches(lengths: list[int], batch_size: int, order: torch.Generator) -> LengthGroupedSampler:
    """The order of rows in an epoch: texts of similar length share a batch."""
    return LengthGroupedSampler(batch_size, lengths=lengths, generator=order)


def arguments(
    config: TrainingConfig, scratch: str, total: int, *, seed: int, bf16: bool
) -> TrainingArguments:
    """Arguments of a training of ``total`` optimiser steps."""
    return TrainingArguments(
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


@dataclass(frozen=True, slots=True)
class _Row:
    row: int
    tokens: Tokens


class _Rows(Dataset[_Row]):
    def __init__(self, tokens: Sequence[Tokens]):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    @override
    def __getitem__(self, row: int) -> _Row:
        return _Row(row, self.tokens[row])


class _Padding:
    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, examples: list[_Row]) -> dict[str, Tensor]:
        ids, mask = pad([example.tokens for example in examples], self.pad_id)
        rows = torch.tensor([example.row for example in examples])
        return {**inputs_of(ids), "attention_mask": mask, "rows": rows}


class _Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, on_step: ProgressCallback):
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step, state.max_steps)


class _Averages(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Replace the weights by their exponential moving average when the training ends.

    The decay starts small, ``min(decay, (1 + step) / (10 + step))``, so that the first weights are
    forgotten however short the training is.
    """

    def __init__(self, weights: list[nn.Parameter], decay: float):
        self.weights, self.decay = weights, decay
        self.mean = [weight.detach().clone() for weight in weights]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(self.mean, [weight.detach() for weight in self.weights], 1 - decay)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch._foreach_copy_([weight.detach() for weight in self.weights], self.mean)


class ExampleTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trainer of ``model`` in place; see ``training.fit``."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Sequence[Tokens],
        batch_loss: BatchLoss,
        args: TrainingArguments,
        config: TrainingConfig,
        *,
        pad_id: int,
        head: set[str],
        meter: FlopMeter,
        proximal: float,
        on_step: ProgressCallback | None,
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Rows(tokens),
            data_collator=_Padding(pad_id),
            callbacks=[_Progress(on_step)] if on_step else None,
        )
        # Before a training there is nothing to free, and to collect all of Python's garbage takes 0.5 s.
        self.accelerator.free_memory = lambda *objects: objects
        if config.ema:
            self.add_callback(_Averages(self._trained(), config.ema))
        self.remove_callback(PrinterCallback)  # it prints what our records hold
        self.lengths = [len(text) for text in tokens]
        self.batch_loss, self.config, self.head, self.meter = batch_loss, config, head, meter
        self.optimizer: torch.optim.Optimizer | None
        self.proximal = proximal
        self.start = [p.detach().clone() for p in self._trained()] if proximal else []
        self.model_accepts_loss_kwargs = (
            True  # our loss is divided by the terms of the step: no more by Trainer
        )

    @override
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of an optimiser step and the number of terms in all of them."""
        batches = list(islice(epoch_iterator, num_batches))
        terms = [self.batch_loss(Batch(**inputs, step=self.state.global_step)) for inputs in batches]
        # The only place where a step's terms are counted: several processes would add theirs here.
        count = sum(part.count for part in terms)
        return [{**inputs, "terms": part} for inputs, part in zip(batches, terms, strict=True)], count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The share of a batch in the loss of a step, which is a mean over terms; counts its operations."""
        terms: Terms = inputs.pop("terms")
        batch = Batch(**inputs, step=self.state.global_step)
        loss = terms.total(model, batch) / max(int(num_items_in_batch or 0), 1)
        share = 0.5 * self.proximal / self.current_gradient_accumulation_steps  # a step adds it once
        for now, then in zip(self._trained(), self.start, strict=False):
            loss = loss + share * (now - then).square().sum()
        self.meter.add(*batch.input_ids.shape, training=True)
        return (loss, None) if return_outputs else loss

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def create_optimizer(self, *_: Any) -> Any:
        """AdamW; the head may have another learning rate."""
        if self.optimizer is None:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            body = [p for n, p in trained if n not in self.head]
            head = [p for n, p in trained if n in self.head]
            rate = self.config.learning_rate
            rates = ((body, rate), (head, self.config.head_learning_rate or rate))
            self.optimizer = torch.optim.AdamW(
                [{"params": params, "lr": lr} for params, lr in rates if params],
                weight_decay=self.config.weight_decay,
                fused=True,
            )
        return self.optimizer

    def loss_curve(self) -> list[tuple[int, float]]:
        """``(step, loss)`` as logged."""
        return [(int(e["step"]), float(e["loss"])) for e in self.state.log_history if "loss" in e]

    def _get_train_sampler(self, *_: Any) -> LengthGroupedSampler:
        order = torch.Generator().manual_seed(self.args.seed)
        return in_batches(self.lengths, self.config.batch_size, order)
