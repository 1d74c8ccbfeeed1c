"""Causal language modelling: texts are packed into blocks, and each row predicts the next token."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from feddistill import metrics, payload
from feddistill.alignment import Vocabulary, check_alignable
from feddistill.config import Config
from feddistill.config.models import ModelConfig
from feddistill.config.training import DistillConfig
from feddistill.errors import ConfigError, ModelError
from feddistill.federation import answer_files, encoding
from feddistill.modelio import inference
from feddistill.modelio.outputs import hidden_states
from feddistill.modelio.packing import PackedTexts
from feddistill.models import causal
from feddistill.models.tokenizers import fingerprint, text_bounds, tokenizer_of, without_token_types
from feddistill.store.logit_files import Chained, TopKFile
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import BuiltModel, Learner
from feddistill.tasks.query import ProxyQuery, domains_of
from feddistill.tasks.translation import Side, Translation, kept_before
from feddistill.training import BatchLoss, Examples
from feddistill.training.blocks import (
    BlockExamples,
    concatenate,
    examples_of,
    repeated,
    select,
    with_hard_targets,
)
from feddistill.training.losses import BlockLoss
from feddistill.types import ProgressCallback, RoundSpec, Splits, TextSet
from feddistill_kernels import TopK, topk_compress


class CausalLanguageModel(Learner):
    """A causal language model. Logits of all tokens over the whole vocabulary are never all in memory."""

    masked: ClassVar[bool] = False
    """True for a masked language model."""

    specialist: causal.Causal

    @override
    @classmethod
    def build(
        cls,
        config: Config,
        model: ModelConfig,
        name: str,
        seed: int,
        public: Sequence[str],
        labels: Sequence[str],
    ) -> causal.Causal:
        try:
            return causal.build(model, seed, name, public, language=config.language, masked=cls.masked)
        except (causal.LooksAheadError, causal.LooksBackError):
            if name != "student.model":
                client, student = ("causal", "masked") if cls.masked else ("masked", "causal")
                check_alignable(client, student, False, name)
            raise

    @override
    @classmethod
    def query(cls, config: Config, splits: Splits) -> ProxyQuery:
        proxy, model = splits.proxy, config.student.model
        tokenizer = tokenizer_of(model.source, "student.model", proxy.texts)
        reader = causal.reader_of(tokenizer, model, config.language, "student.model")
        blocks = reader.blocks(proxy, model.max_tokens)
        rows = cls.query_rows(config, blocks, proxy.name)
        domains = domains_of(proxy)
        return ProxyQuery(
            positions=len(rows),
            vocab_size=reader.vocab_size,
            fingerprint=fingerprint(tokenizer),
            labels=torch.from_numpy(blocks.targets[rows]),
            domains=None if domains is None else domains[torch.from_numpy(blocks.texts[rows + 1])],
            reader=reader,
            blocks=blocks,
            rows=torch.from_numpy(rows),
            compressed=True,
        )

    @staticmethod
    def query_rows(config: Config, blocks: PackedTexts, name: str) -> NDArray[np.int64]:
        """The rows to predict of the texts ``name``: every ``position_stride``-th that is in the loss."""
        stride = config.language.position_stride
        return np.flatnonzero(blocks.loss_mask)[stride - 1 :: stride]

    @override
    @classmethod
    def check_built(
        cls, built: BuiltModel, config: Config, splits: Splits, name: str, query: ProxyQuery
    ) -> None:
        """Check that the model can predict the student's tokens."""
        length = config.student.model.max_tokens
        assert isinstance(built, causal.Causal), "of this task"
        assert query.reader is not None, "a language model's query has a reader"
        if _reads_alike(built.reader, query.reader):
            if built.max_tokens < length:
                raise ModelError(
                    f"{name}.max_tokens = {built.max_tokens}, but the student's blocks have {length} tokens"
                )
            return
        if fingerprint(built.tokenizer) == query.fingerprint and (
            cls.masked or config.payload.codec == "sampled"
        ):
            raise ConfigError(
                f"{name} and student.model have the same tokenizer but begin texts in different ways: set "
                "language.text_start to one for both"
            )
        if cls.masked:
            check_alignable("masked", "masked", False, name)
        if config.payload.codec == "sampled":
            raise ConfigError(
                "payload.codec = 'sampled' cannot mark a row as abstained, but the tokenizer of "
                f"{name} is not the student's; use 'topk' or 'threshold'"
            )
        Vocabulary(built.tokenizer, f"{name}: its tokenizer")

    @override
    @staticmethod
    def prepare_export(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        without_token_types(tokenizer)
        assert isinstance(model, PreTrainedModel), "of transformers"
        model.config.use_cache = True
        generation = GenerationConfig.from_model_config(model.config)
        bounds = text_bounds(tokenizer, "auto", "the student")  # as in training: see ``begin_texts``
        pad = tokenizer.pad_token_id
        for settings in (generation, model.config):
            settings.bos_token_id = bounds.start
            settings.eos_token_id = bounds.end
            settings.pad_token_id = bounds.end if pad is None else pad
        model.generation_config = generation

    @cached_property
    def _blocks(self) -> dict[tuple[str, int], PackedTexts]:
        return {}

    def blocks(self, texts: TextSet, length: int | None = None) -> PackedTexts:
        """``texts`` as this model reads them."""
        key = texts.name, length or self.specialist.max_tokens
        if key not in self._blocks:  # public sets are read in every round
            self._blocks[key] = self.specialist.reader.blocks(texts, key[1])
        return self._blocks[key]

    @override
    def tokens(self, texts: TextSet) -> list[NDArray[np.int64]]:
        blocks = self.blocks(texts)
        return [blocks[b] for b in range(len(blocks))]

    @override
    def examples(self, texts: TextSet) -> BlockExamples:
        return examples_of(self.blocks(texts))

    @override
    def teacher_examples(self, *teachers: str) -> BlockExamples:
        blocks, rows = self._query()
        files = [TopKFile.open(self.session.run.path(teacher)) for teacher in teachers]
        return repeated(examples_of(blocks, Chained(files), rows), len(files), len(rows))

    @override
    def proxy_examples(self) -> int:
        return len(self._query()[0] if self._translation is None else self._translation.client.blocks)

    @cached_property
    def _translation(self) -> Translation | None:
        """The projection to the student's tokens; ``None`` if this model reads texts as the student does."""
        query, proxy = self.session.query, self.session.splits.proxy
        assert query.reader is not None, "a language model's query has a reader"
        if _reads_alike(self.specialist.reader, query.reader):
            return None
        client = Side(self.specialist.reader, proxy, self.blocks(proxy), self.name)
        student = Side(query.reader, proxy, self._query()[0], "student.model")
        alignment = self.session.config.language.alignment
        return Translation(client, student, self.session.run.path("maps"), alignment)

    def _query(self) -> tuple[PackedTexts, Tensor]:
        """The proxy texts as the student reads them, and the rows to predict."""
        query = self.session.query
        assert query.blocks is not None, "a language model's query has blocks"
        assert query.rows is not None, "and rows of them"
        return query.blocks, query.rows

    @override
    def with_teacher(
        self, private: TextSet, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer, target: str
    ) -> BlockExamples:
        own = self.examples(private)
        if self._translation is not None:
            proxy = self._projected(self._translation, chosen, stored)
        else:
            blocks, rows = self._query()
            picked = np.flatnonzero(np.isin(rows.numpy() // (blocks.length - 1), chosen))
            teacher = TopK.cat(list(stored.picked(encoding.topk, picked)))
            proxy = examples_of(blocks, teacher, rows[torch.from_numpy(picked)])
        if target == "hard" and proxy.teacher is not None:
            proxy = with_hard_targets(proxy)
        return concatenate(own, select(proxy, chosen.tolist()))

    def _projected(
        self, translation: Translation, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer
    ) -> BlockExamples:
        """The proxy texts as this model reads them, with the teacher's predictions for blocks ``chosen``."""
        blocks, student_rows = translation.client.blocks, self._query()[1].numpy()
        in_chosen = np.isin(np.arange(blocks.rows) // (blocks.length - 1), chosen)
        own_rows = np.flatnonzero(in_chosen & blocks.loss_mask)
        picked = np.flatnonzero(np.isin(student_rows, translation.student_rows(own_rows)))
        if not len(picked):
            return examples_of(blocks)
        predictions = TopK.cat(list(stored.picked(encoding.topk, picked)))
        k = min(stored.spec.k, self.specialist.reader.vocab_size)
        teacher, rows = translation.teacher(predictions, student_rows[picked], own_rows, k)
        return examples_of(blocks, teacher, torch.from_numpy(rows))

    @override
    def loss(self, examples: Examples, distill: DistillConfig | None, seed: int) -> BatchLoss:
        assert isinstance(examples, BlockExamples), "of blocks"
        return BlockLoss(examples, distill, self.specialist.reader.vocab_size, self.session.bf16)

    @override
    def compressed(
        self, spec: RoundSpec, seed: int, start: int, stop: int, on_step: ProgressCallback | None = None
    ) -> payload.Answers:
        blocks, query_rows = self._query()
        rows = query_rows[start:stop].numpy()
        if self._translation is None:
            logits = self._logits(self._inputs(blocks, query_rows.numpy()), rows, on_step)
            return encoding.compress_parts(logits, spec, seed)
        own_rows = self._translation.client_rows(rows)
        kept = kept_before(spec.k, self.specialist.reader.vocab_size)
        parts = self._logits(self._translation.client.blocks, own_rows, on_step)
        own = (topk_compress(logits, kept, id_order=False) for logits in parts)
        projected = self._translation.answers(own, own_rows, rows, spec.k)
        return encoding.compress_parts(projected, spec, seed)

    @override
    def projection(self) -> Json | None:
        return None if self._translation is None else self._translation.counted()

    @override
    def metrics(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        blocks = self.blocks(texts)
        rows = np.flatnonzero(blocks.loss_mask)
        nats = sum(cross_entropy(*pair) for pair in self._logits_and_targets(blocks, rows, on_step))
        return metrics.language(nats, len(rows), self.specialist.reader.bytes(texts)).as_dict()

    def _logits_and_targets(
        self, blocks: PackedTexts, rows: NDArray[np.int64], on_step: ProgressCallback | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``_logits`` of ``rows`` with the tokens that they predict, ``[m]``."""
        targets, start = torch.from_numpy(blocks.targets[rows]), 0
        for logits in self._logits(self._inputs(blocks, rows), rows, on_step):
            yield logits, targets[start : start + len(logits)]
            start += len(logits)

    def _inputs(self, blocks: PackedTexts, rows: NDArray[np.int64]) -> PackedTexts:
        """``blocks`` as the model reads them to predict ``rows``."""
        return blocks

    def _states(self, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """The head's input, ``[n, H]``, to predict the tokens after ``positions`` of ``ids [B * L]``."""
        return hidden_states(self.model, ids).flatten(0, 1)[positions]

    def _logits(
        self, blocks: PackedTexts, rows: NDArray[np.int64], on_step: ProgressCallback | None
    ) -> Iterator[Tensor]:
        """Logits ``[m, V]`` of ``rows``, which ascend, a few rows at a time."""
        needed = np.unique(rows // (blocks.length - 1))
        self.compute_frozen([blocks[block] for block in needed])
        for logits in inference.answer_rows(
            self.model,
            self._states,
            blocks,
            rows,
            self.specialist.reader.vocab_size,
            pad_id=self.specialist.pad_id,
            batch_size=self.session.config.clients.eval_batch_size,
            bf16=self.session.bf16,
            meter=self.meter,
            on_step=on_step,
        ):
            if logits.sum().isnan():
                raise self.not_a_number()
            yield logits


def _reads_alike(one: causal.TextReader, other: causal.TextReader) -> bool:
    """True if both pack texts into the same blocks."""
    return one.bounds == other.bounds and fingerprint(one.tokenizer) == fingerprint(other.tokenizer)


def cross_entropy(logits: Tensor, targets: Tensor) -> float:
    """The sum over rows, in nats."""
    return float(nn.functional.cross_entropy(logits, targets, reduction="none").double().sum())
