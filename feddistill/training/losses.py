"""The loss of a batch for each kind of training examples: texts, blocks, masked blocks, questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from feddistill.config.training import DistillConfig
from feddistill.modelio.outputs import head_of, hidden_states, masked_states, span_logits
from feddistill.modelio.padding import Tokens, pad
from feddistill.training.blocks import NO_TEACHER, BlockExamples, Masking, block_loss, rows_of
from feddistill.training.spans import NEVER, SpanExamples, token_log_probs
from feddistill.training.texts import TrainingExamples, example_loss
from feddistill.types import NO_LABEL
from feddistill_kernels import TopK


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model reads in one step, ``[B, L]`` tokens."""

    input_ids: Tensor
    """``[B, L]``."""
    attention_mask: Tensor
    """``[B, L]``, 0 for padding."""
    rows: Tensor
    """``[B]``, indices of the examples."""


class Examples(Protocol):
    """A training set."""

    @property
    def tokens(self) -> Sequence[Tokens]:
        """Token ids of each example."""
        ...


class BatchLoss(Protocol):
    """The loss of a batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar with a gradient."""
        ...


class TextLoss:
    """Cross-entropy and distillation loss of texts with one prediction each."""

    def __init__(self, examples: TrainingExamples, distill: DistillConfig | None):
        self.examples, self.distill = examples, distill

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """``example_loss`` of the batch."""
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        examples, device, rows = self.examples, batch.rows.device, batch.rows.cpu()
        teacher = None if examples.teacher is None else examples.teacher[rows].to(device)
        mask = None if examples.distill_mask is None else examples.distill_mask[rows].to(device)
        return example_loss(logits, examples.labels[rows].to(device), teacher, mask, self.distill)


class QuestionLoss:
    """Loss of questions, over the tokens at which their answers begin and end."""

    def __init__(self, examples: SpanExamples, distill: DistillConfig | None, types: bool):
        self.examples, self.distill, self.types = examples, distill, types

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """``example_loss`` of two rows a question, its start and its end."""
        examples, ids, rows = self.examples, batch.input_ids, batch.rows.cpu()
        windows, length = [examples.windows[row] for row in rows.tolist()], ids.shape[1]
        types = pad([window.types for window in windows], 0)[0].to(ids.device) if self.types else None
        logits = span_logits(model, ids, batch.attention_mask, types).float()
        labels = examples.labels[rows]
        teacher, mask = None, None
        if examples.teacher_rows is not None:
            pairs = examples.teacher_rows[rows]
            teacher = self._teacher(rows, pairs, length).flatten(0, 1).to(ids.device)
            mask = (pairs != NO_TEACHER).repeat_interleave(2).to(ids.device)
        elif (labels == NO_LABEL).all():
            return logits.sum() * 0.0
        choices = torch.zeros(len(windows), 1, length, dtype=torch.bool)
        for row, window in enumerate(windows):
            choices[row, 0, : len(window)] = torch.from_numpy(window.choices)
        logits = logits.masked_fill(~choices.to(ids.device), NEVER)
        return example_loss(
            logits.flatten(0, 1), labels.flatten().to(ids.device), teacher, mask, self.distill
        )

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

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """``block_loss`` of all rows of the blocks."""
        ids = batch.input_ids
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = hidden_states(model, ids)
        positions, rows = rows_of(self.examples, batch.rows.tolist(), ids.shape[1])
        hidden = hidden.flatten(0, 1)[positions.to(ids.device)]
        return self._loss(model, hidden, rows, self._teacher_rows(rows))

    def _teacher_rows(self, rows: Tensor) -> Tensor:
        """The teacher's row for each of ``rows``; ``NO_TEACHER`` without one."""
        index = self.examples.teacher_rows
        return torch.full_like(rows, NO_TEACHER) if index is None else index[rows]

    def _loss(self, model: nn.Module, hidden: Tensor, rows: Tensor, teacher_rows: Tensor) -> Tensor:
        """``block_loss`` of ``hidden [n, H]``, which predict the tokens of ``rows``."""
        examples, device = self.examples, hidden.device
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        teacher: TopK | None = None
        mask: Tensor | None = None
        if examples.teacher is not None:
            mask = teacher_rows != NO_TEACHER
            teacher = examples.teacher[teacher_rows[mask]].to(device)
            predicted = (teacher.log_probs > -torch.inf).any(-1).cpu()  # False where the teacher abstains
            mask[mask.clone()] = predicted
            teacher, mask = teacher[predicted.to(device)], mask.to(device)
        weight, bias = head_of(model)
        with torch.autocast(device.type, enabled=False):
            return block_loss(
                hidden.to(dtype),
                weight.to(dtype),
                None if bias is None else bias.to(dtype),
                examples.labels[rows].to(device),
                teacher,
                mask,
                self.distill,
                self.vocab_size,
            )


class MaskedLoss(BlockLoss):
    """Loss of blocks, of which masked tokens are predicted.

    In half of the passes over a block with a teacher's predictions, the tokens that the teacher predicts are
    masked; in all other passes masked tokens are drawn at random.
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
        self.masking = masking
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """``block_loss`` of the masked tokens."""
        ids, blocks = batch.input_ids, batch.rows.tolist()
        positions, rows = rows_of(self.examples, blocks, ids.shape[1])
        positions, teacher_rows = positions + 1, self._teacher_rows(rows)  # a row is about the next token
        block = positions // ids.shape[1]
        by_teacher = (torch.rand(len(blocks), generator=self.random) < 0.5)[block]
        by_teacher &= self._has_teacher(teacher_rows, block, len(blocks))
        drawn = torch.rand(len(rows), generator=self.random) < self.masking.share
        learned = self.examples.labels[rows] != NO_LABEL
        masked = torch.where(by_teacher, teacher_rows != NO_TEACHER, drawn & learned)
        if not masked.any():  # few tokens, and none was drawn
            masked[int(torch.randint(len(rows), (1,), generator=self.random))] = True
        inputs = ids.flatten().clone()
        how = torch.rand(len(rows), generator=self.random)
        inputs[positions[masked & (by_teacher | (how < 0.8))].to(ids.device)] = self.masking.token
        other = masked & ~by_teacher & (how >= 0.9)
        random_ids = torch.randint(self.vocab_size, (int(other.sum()),), generator=self.random)
        inputs[positions[other].to(ids.device)] = random_ids.to(ids.device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            states = masked_states(
                model, inputs.view_as(ids), batch.attention_mask, positions[masked].to(ids.device)
            )
        teacher_rows = torch.where(by_teacher, teacher_rows, NO_TEACHER)
        return self._loss(model, states, rows[masked], teacher_rows[masked])

    @staticmethod
    def _has_teacher(teacher_rows: Tensor, block: Tensor, blocks: int) -> Tensor:
        """For each row, True if the teacher predicts any row of its block."""
        predicted = (teacher_rows != NO_TEACHER).long()
        count = torch.zeros(blocks, dtype=torch.int64).index_add_(0, block, predicted)
        return count[block] > 0
