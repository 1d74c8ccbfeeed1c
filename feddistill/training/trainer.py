"""``transformers.Trainer`` with our loss, and with texts of about one length in a batch."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from feddistill.accounting import FlopMeter
from feddistill.config.training import DistillConfig, TrainingConfig
from feddistill.modelio.outputs import head_of, hidden_states, masked_states, span_logits
from feddistill.modelio.padding import pad
from feddistill.training.blocks import NOT_TAUGHT, BlockExamples, Masking, block_loss, rows_of
from feddistill.training.spans import NEVER, SpanExamples, said_of_tokens
from feddistill.training.texts import TrainingExamples, example_loss
from feddistill.types import NO_LABEL, ProgressCallback


def in_batches(lengths: list[int], batch_size: int, order: torch.Generator) -> LengthGroupedSampler:
    """Rows in the order of an epoch: texts of about one length share a batch."""
    return LengthGroupedSampler(batch_size, lengths=lengths, generator=order)


def arguments(
    config: TrainingConfig, scratch: str, total: int, *, seed: int, bf16: bool
) -> TrainingArguments:
    """Of ``total`` optimiser steps."""
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


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self, tokens: Sequence[Any]):
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
    def __init__(self, on_step: ProgressCallback):
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step, state.max_steps)


class _Averages(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Ends a training with an exponential moving average of the weights.

    The decay grows to the one that is asked for, ``min(decay, (1 + step) / (10 + step))``, so that the
    weights of the beginning are forgotten however short the training is.
    """

    def __init__(self, weights: list[nn.Parameter], decay: float):
        self.weights, self.decay = weights, decay
        self.mean = [weight.detach().clone() for weight in weights]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(self.mean, [weight.detach() for weight in self.weights], 1 - decay)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch._foreach_copy_([weight.detach() for weight in self.weights], self.mean)


class BatchLoss(Protocol):
    """The loss of a batch."""

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """A scalar; ``inputs`` are token ids, their mask, and which ``rows`` of the lessons they are."""
        ...


class TextLoss:
    """Of texts that have one answer each."""

    def __init__(self, lessons: TrainingExamples, distill: DistillConfig | None):
        self.lessons, self.distill = lessons, distill

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """See ``BatchLoss``."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        device, rows = inputs["rows"].device, inputs["rows"].cpu()
        teacher = None if self.lessons.teacher is None else self.lessons.teacher[rows].to(device)
        taught = None if self.lessons.taught is None else self.lessons.taught[rows].to(device)
        return example_loss(
            outputs.logits, self.lessons.labels[rows].to(device), teacher, taught, self.distill
        )


class QuestionLoss:
    """Of questions, whose answers begin at one token and end at another."""

    def __init__(self, lessons: SpanExamples, distill: DistillConfig | None, types: bool):
        self.lessons, self.distill, self.types = lessons, distill, types

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """See ``BatchLoss``."""
        lessons, ids, rows = self.lessons, inputs["input_ids"], inputs["rows"].cpu()
        pages, length = [lessons.pages[row] for row in rows.tolist()], ids.shape[1]
        types = pad([page.types for page in pages], 0)[0].to(ids.device) if self.types else None
        logits = span_logits(model, ids, inputs["attention_mask"], types).float()
        labels = lessons.labels[rows]
        taught = None if lessons.taught is None else lessons.taught[rows]
        teacher = None
        if taught is not None:
            assert lessons.teacher is not None, "questions that are taught have a teacher"
            teacher = torch.zeros(len(pages), 2, length)
            for at, (page, pair) in enumerate(zip(pages, taught.tolist(), strict=True)):
                if pair != NOT_TAUGHT:
                    said = said_of_tokens(lessons.teacher[torch.tensor([2 * pair, 2 * pair + 1])], page)
                    teacher[at] = nn.functional.pad(said, (0, length - len(page)), value=NEVER)
            teacher = teacher.flatten(0, 1).to(ids.device)
            taught = (taught != NOT_TAUGHT).repeat_interleave(2).to(ids.device)
        elif (labels == NO_LABEL).all():
            return logits.sum() * 0.0
        chosen = torch.zeros(len(pages), 1, length, dtype=torch.bool)
        for at, page in enumerate(pages):
            chosen[at, 0, : len(page)] = torch.from_numpy(page.choices)
        logits = logits.masked_fill(~chosen.to(ids.device), NEVER)
        return example_loss(
            logits.flatten(0, 1), labels.flatten().to(ids.device), teacher, taught, self.distill
        )


class BlockLoss:
    """Of blocks, whose every token is one to predict."""

    def __init__(self, lessons: BlockExamples, distill: DistillConfig | None, vocab_size: int, bf16: bool):
        self.lessons, self.distill, self.vocab_size, self.bf16 = lessons, distill, vocab_size, bf16

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """See ``BatchLoss``."""
        ids = inputs["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = hidden_states(model, ids)
        places, rows = rows_of(self.lessons, inputs["rows"].tolist(), ids.shape[1])
        return self._loss(model, hidden.flatten(0, 1)[places.to(ids.device)], rows, self._answers(rows))

    def _answers(self, rows: Tensor) -> Tensor:
        """Which of the teacher's rows answers each; ``NOT_TAUGHT`` for none."""
        taught = self.lessons.taught
        return torch.full_like(rows, NOT_TAUGHT) if taught is None else taught[rows]

    def _loss(self, model: nn.Module, hidden: Tensor, rows: Tensor, answers: Tensor) -> Tensor:
        """Of ``hidden [n, H]``, which predict the tokens of ``rows``."""
        lessons, device = self.lessons, hidden.device
        kind = torch.bfloat16 if self.bf16 else torch.float32
        teacher, taught = None, None
        if lessons.teacher is not None:
            taught = answers != NOT_TAUGHT
            teacher = lessons.teacher[answers[taught]].to(device)
            said = (teacher.log_probs > -torch.inf).any(-1).cpu()
            taught[taught.clone()] = said
            teacher = teacher[said.to(device)]
            taught = taught.to(device)
        weight, bias = head_of(model)
        with torch.autocast(device.type, enabled=False):
            return block_loss(
                hidden.to(kind),
                weight.to(kind),
                None if bias is None else bias.to(kind),
                lessons.labels[rows].to(device),
                teacher,
                taught,
                self.distill,
                self.vocab_size,
            )


class MaskedLoss(BlockLoss):
    """Of blocks, some of whose tokens are hidden.

    A block that the teacher was asked about has the tokens hidden that it was asked, half of the times that
    it is read; in all other cases they are drawn anew.
    """

    def __init__(
        self,
        lessons: BlockExamples,
        distill: DistillConfig | None,
        vocab_size: int,
        bf16: bool,
        masking: Masking,
        seed: int,
    ):
        super().__init__(lessons, distill, vocab_size, bf16)
        self.masking = masking
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """See ``BatchLoss``."""
        ids, blocks = inputs["input_ids"], inputs["rows"].tolist()
        places, rows = rows_of(self.lessons, blocks, ids.shape[1])
        places, answers = places + 1, self._answers(rows)  # a row is about the token behind it
        asked = (torch.rand(len(blocks), generator=self.random) < 0.5)[places // ids.shape[1]]
        asked &= self._has_answers(answers, places // ids.shape[1], len(blocks))
        drawn = torch.rand(len(rows), generator=self.random) < self.masking.share
        learned = self.lessons.labels[rows] != NO_LABEL
        hidden = torch.where(asked, answers != NOT_TAUGHT, drawn & learned)
        if not hidden.any():  # few tokens, and none was drawn
            hidden[int(torch.randint(len(rows), (1,), generator=self.random))] = True
        shown = ids.flatten().clone()
        how = torch.rand(len(rows), generator=self.random)
        shown[places[hidden & (asked | (how < 0.8))].to(ids.device)] = self.masking.token
        other = hidden & ~asked & (how >= 0.9)
        drawn_ids = torch.randint(self.vocab_size, (int(other.sum()),), generator=self.random)
        shown[places[other].to(ids.device)] = drawn_ids.to(ids.device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            states = masked_states(
                model, shown.view_as(ids), inputs["attention_mask"], places[hidden].to(ids.device)
            )
        answers = torch.where(asked, answers, NOT_TAUGHT)
        return self._loss(model, states, rows[hidden], answers[hidden])

    @staticmethod
    def _has_answers(answers: Tensor, block: Tensor, blocks: int) -> Tensor:
        """Of each row, whether its block has a row that is answered."""
        count = torch.zeros(blocks, dtype=torch.int64).index_add_(0, block, (answers != NOT_TAUGHT).long())
        return count[block] > 0


class ExampleTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trains ``model`` in place; see ``training.fit``."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Sequence[Any],
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
            callbacks=[_Ticker(on_step)] if on_step else None,
        )
        if config.ema:
            self.add_callback(_Averages(self._trained(), config.ema))
        self.remove_callback(PrinterCallback)  # its lines of numbers; ours go to the records
        self.lengths = [len(text) for text in tokens]
        self.batch_loss, self.config, self.head, self.meter = batch_loss, config, head, meter
        self.optimizer: torch.optim.Optimizer | None
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
        """Of a batch; counts its operations."""
        loss = self.batch_loss(model, inputs)
        for now, then in zip(self._trained(), self.start, strict=False):
            loss = loss + 0.5 * self.proximal * (now - then).square().sum()
        self.meter.add(*inputs["input_ids"].shape, training=True)
        return (loss, None) if return_outputs else loss

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def create_optimizer(self, *_: Any) -> Any:
        """AdamW with a learning rate of the head's own."""
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
        return in_batches(self.lengths, self.config.batch_size, order)
