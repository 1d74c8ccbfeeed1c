"""The loss of a batch for each kind of training examples: texts, blocks, masked blocks, questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from feddistill.config.training import DistillConfig
from feddistill.modelio.outputs import head_of, hidden_states, masked_states, span_logits
from feddistill.modelio.padding import Tokens, pad
from feddistill.seeds import generator
from feddistill.training.blocks import NO_TEACHER, BlockExamples, Masking, block_loss, rows_of
from feddistill.training.spans import NEVER, SpanExamples, token_log_probs
from feddistill.training.texts import TrainingExamples, example_loss
from feddistill.types import NO_LABEL
from feddistill_kernels import TopK

T = TypeVar("T", Tensor | None, TopK | None)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model reads in one pass, ``[B, L]`` tokens."""

    input_ids: Tensor
    """``[B, L]``."""
    attention_mask: Tensor
    """``[B, L]``, 0 for padding."""
    rows: Tensor
    """``[B]``, indices of the examples."""
    step: int = 0
    """Optimiser steps before this one. What is drawn for an example depends on it and on its row, and not on
    the batch that it is in."""
    token_type_ids: Tensor | None = None
    """``[B, L]``; ``None``: all are 0."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The loss of a batch as a sum. An optimiser step divides the sum over its batches by their counts."""

    count: int
    """Number of terms: predictions that have a label, a teacher, or both."""
    total: Callable[[nn.Module, Batch], Tensor]
    """Their sum, a scalar with a gradient, from the model and the batch on the model's device."""


class Examples(Protocol):
    """A training set."""

    @property
    def tokens(self) -> Sequence[Tokens]:
        """Token ids of each example."""
        ...


class BatchLoss(Protocol):
    """The loss of a batch."""

    def __call__(self, batch: Batch) -> Terms:
        """Count the terms, before the model runs."""
        ...


class TextLoss:
    """Cross-entropy and distillation loss of texts with one prediction each."""

    def __init__(self, examples: TrainingExamples, distill: DistillConfig | None):
        self.examples, self.distill = examples, distill

    def __call__(self, batch: Batch) -> Terms:
        """Terms: one a text."""
        examples, rows = self.examples, batch.rows.cpu()
        labels = examples.labels[rows]
        teacher = None if examples.teacher is None else examples.teacher[rows]
        mask = None if teacher is None or examples.distill_mask is None else examples.distill_mask[rows]
        return Terms(_count(labels, teacher, mask), partial(self._total, labels, teacher, mask))

    def _total(
        self, labels: Tensor, teacher: Tensor | None, mask: Tensor | None, model: nn.Module, batch: Batch
    ) -> Tensor:
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types).logits
        labels, teacher, mask = _on(logits.device, labels, teacher, mask)
        return example_loss(logits, labels, teacher, mask, self.distill)


class QuestionLoss:
    """Loss of questions, over the tokens at which their answers begin and end."""

    def __init__(self, examples: SpanExamples, distill: DistillConfig | None, types: bool):
        self.examples, self.distill, self.types = examples, distill, types

    def __call__(self, batch: Batch) -> Terms:
        """Terms: two a question, its start and its end."""
        examples, rows = self.examples, batch.rows.cpu()
        labels = examples.labels[rows].flatten()
        teacher, mask = None, None
        if examples.teacher_rows is not None:
            pairs = examples.teacher_rows[rows]
            teacher = self._teacher(rows, pairs, batch.input_ids.shape[1]).flatten(0, 1)
            mask = (pairs != NO_TEACHER).repeat_interleave(2)
        return Terms(_count(labels, teacher, mask), partial(self._total, labels, teacher, mask))

    def _total(
        self, labels: Tensor, teacher: Tensor | None, mask: Tensor | None, model: nn.Module, batch: Batch
    ) -> Tensor:
        ids, length = batch.input_ids, batch.input_ids.shape[1]
        windows = [self.examples.windows[row] for row in batch.rows.tolist()]
        types = pad([window.types for window in windows], 0)[0].to(ids.device) if self.types else None
        logits = span_logits(model, ids, batch.attention_mask, types).float()
        choices = torch.zeros(len(windows), 1, length, dtype=torch.bool)
        for row, window in enumerate(windows):
            choices[row, 0, : len(window)] = torch.from_numpy(window.choices)
        logits = logits.masked_fill(~choices.to(ids.device), NEVER)
        labels, teacher, mask = _on(ids.device, labels, teacher, mask)
        return example_loss(logits.flatten(0, 1), labels, teacher, mask, self.distill)

    def _teacher(self, rows: Tensor, pairs: Tensor, length: int) -> Tensor:
        """``[B, 2, L]`` log-probabilities over tokens; zeros for questions without a teacher."""
        assert self.examples.teacher is not None, "teacher_rows are rows of a teacher"
        teacher = torch.zeros(len(rows), 2, length)
        for index, (row, pair) in enumerate(zip(rows.tolist(), pairs.tolist(), strict=True)):
            if pair != NO_TEACHER:
                window = self.examples.windows[row]
                both = self.examples.teacher[torch.tensor([2 * pair, 2 * pair + 1])]
                log_probs = token_log_probs(both, window)
                teacher[index] = nn.functional.pad(log_probs, (0, length - len(window)), value=NEVER)
        return teacher


class BlockLoss:
    """Loss of blocks, of which every token is predicted from those before it."""

    def __init__(self, examples: BlockExamples, distill: DistillConfig | None, vocab_size: int, bf16: bool):
        self.examples, self.distill, self.vocab_size, self.bf16 = examples, distill, vocab_size, bf16

    def __call__(self, batch: Batch) -> Terms:
        """Terms: one a row of the blocks, that is, one a token to predict."""
        positions, rows = rows_of(self.examples, batch.rows.tolist(), batch.input_ids.shape[1])
        predicted = self._predicted(rows, self._teacher_rows(rows))
        return Terms(predicted.count, partial(self._total, positions, predicted))

    def _total(self, positions: Tensor, predicted: "_Predicted", model: nn.Module, batch: Batch) -> Tensor:
        ids = batch.input_ids
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = hidden_states(model, ids)
        return self._sum(model, hidden.flatten(0, 1)[positions.to(ids.device)], predicted)

    def _teacher_rows(self, rows: Tensor) -> Tensor:
        """The teacher's row for each of ``rows``; ``NO_TEACHER`` without one."""
        index = self.examples.teacher_rows
        return torch.full_like(rows, NO_TEACHER) if index is None else index[rows]

    def _predicted(self, rows: Tensor, teacher_rows: Tensor) -> "_Predicted":
        """Labels and predictions of ``rows``; a row on which the teacher abstains has none."""
        labels = self.examples.labels[rows]
        if self.examples.teacher is None:
            return _Predicted(labels, None, None)
        mask = teacher_rows != NO_TEACHER
        teacher: TopK = self.examples.teacher[teacher_rows[mask]]
        answered = (teacher.log_probs > -torch.inf).any(-1)
        mask[mask.clone()] = answered
        return _Predicted(labels, teacher[answered], mask)

    def _sum(self, model: nn.Module, hidden: Tensor, predicted: "_Predicted") -> Tensor:
        """``block_loss`` of ``hidden [n, H]``, which predict ``predicted``."""
        device, dtype = hidden.device, torch.bfloat16 if self.bf16 else torch.float32
        weight, bias = head_of(model)
        labels, teacher, mask = _on(device, predicted.labels, predicted.teacher, predicted.mask)
        with torch.autocast(device.type, enabled=False):
            return block_loss(
                hidden.to(dtype),
                weight.to(dtype),
                None if bias is None else bias.to(dtype),
                labels,
                teacher,
                mask,
                self.distill,
                self.vocab_size,
            )


class MaskedLoss(BlockLoss):
    """Loss of blocks, of which masked tokens are predicted.

    In half of the passes over a block with a teacher's predictions, the tokens that the teacher predicts are
    masked; in all other passes masked tokens are drawn at random. What is drawn for a block depends on the
    seed, the step and the block's index alone.
    """

    def __init__(
        self,
        examples: BlockExamples,
        distill: DistillConfig | None,
        vocab_size: int,
        bf16: bool,
        masking: Masking,
        seed: int,
    ):
        super().__init__(examples, distill, vocab_size, bf16)
        self.masking, self.seed = masking, seed

    @override
    def __call__(self, batch: Batch) -> Terms:
        """Terms: one a masked token."""
        length, parts, teacher_rows = batch.input_ids.shape[1], [], []
        inputs = batch.input_ids.cpu().flatten().clone()
        for index, block in enumerate(batch.rows.tolist()):
            random = generator(self.seed, batch.step, block)
            positions, rows = rows_of(self.examples, [block], length)
            positions = positions + 1 + index * length  # a row is about the next token
            taught = self._teacher_rows(rows)
            by_teacher = bool((taught != NO_TEACHER).any()) and random.random() < 0.5
            if by_teacher:
                masked = taught != NO_TEACHER
            else:
                drawn = torch.from_numpy(random.random(len(rows)) < self.masking.share)
                masked = drawn & (self.examples.labels[rows] != NO_LABEL)
            how = torch.from_numpy(random.random(len(rows)))
            inputs[positions[masked & (by_teacher | (how < 0.8))]] = self.masking.token
            other = masked & (how >= 0.9) & (not by_teacher)
            inputs[positions[other]] = torch.from_numpy(
                random.integers(self.vocab_size, size=int(other.sum()))
            )
            parts.append((positions[masked], rows[masked]))
            teacher_rows.append(taught[masked] if by_teacher else torch.full_like(taught[masked], NO_TEACHER))
        places, rows = (torch.cat(part) for part in zip(*parts, strict=True))
        predicted = self._predicted(rows, torch.cat(teacher_rows))
        return Terms(predicted.count, partial(self._masked, inputs, places, predicted))

    def _masked(
        self, inputs: Tensor, positions: Tensor, predicted: "_Predicted", model: nn.Module, batch: Batch
    ) -> Tensor:
        device, shape = batch.input_ids.device, batch.input_ids.shape
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            states = masked_states(
                model, inputs.view(shape).to(device), batch.attention_mask, positions.to(device)
            )
        return self._sum(model, states, predicted)


@dataclass(frozen=True, slots=True)
class _Predicted:
    """``n`` rows of blocks: what ``block_loss`` compares with the model's predictions of them."""

    labels: Tensor
    teacher: TopK | None
    mask: Tensor | None

    @property
    def count(self) -> int:
        labelled = self.labels != NO_LABEL
        return int((labelled if self.mask is None else labelled | self.mask).sum())


def _count(labels: Tensor, teacher: Tensor | None, mask: Tensor | None) -> int:
    """Rows with a label, a teacher, or both; without ``mask`` a teacher predicts all rows."""
    if teacher is None:
        return int((labels != NO_LABEL).sum())
    return len(labels) if mask is None else int(((labels != NO_LABEL) | mask).sum())


def _on(
    device: torch.device, labels: Tensor, teacher: T, mask: Tensor | None
) -> tuple[Tensor, T, Tensor | None]:
    """On the model's device."""
    return (
        labels.to(device),
        None if teacher is None else teacher.to(device),
        None if mask is None else mask.to(device),
    )
