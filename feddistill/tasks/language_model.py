"""A language model as the methods use it: texts are blocks, an answer's rows are tokens to come."""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddistill import metrics, payload
from feddistill.config.models import ModelConfig
from feddistill.errors import ModelError
from feddistill.federation import answer_files, encoding
from feddistill.modelio import inference
from feddistill.modelio.outputs import hidden_states
from feddistill.modelio.packing import PackedTexts
from feddistill.models import causal
from feddistill.models.tokenizers import fingerprint
from feddistill.seeds import derive
from feddistill.store.logit_files import Chained, TopKFile
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner
from feddistill.tasks.translation import Side, Translation, kept_before
from feddistill.training import blocks as lessons
from feddistill.training.blocks import BlockExamples
from feddistill.types import ProgressCallback, RoundSpec, TextSet
from feddistill_kernels import TopK, topk_compress


class CausalLanguageModel(Learner):
    """See ``Learner``. A tensor of all tokens and the whole vocabulary is never made."""

    specialist: causal.Causal  # type: ignore[assignment]  # reads blocks, not texts

    def _build(self, config: ModelConfig) -> causal.Causal:  # type: ignore[override]  # blocks
        self._blocks: dict[tuple[str, int], PackedTexts] = {}
        return causal.build(
            config,
            derive(self.session.config.seed, "init", self.name),
            self.name,
            self.session.splits.proxy.texts,
            answers_only=self.session.config.language.completion_only,
            masked=self.session.config.task == "masked_lm",
        )

    def blocks(self, texts: TextSet, length: int | None = None) -> PackedTexts:
        """``texts`` as this model reads them; kept, as every round asks for them again."""
        key = texts.name, length or self.specialist.max_tokens
        if key not in self._blocks:
            self._blocks[key] = self.specialist.reader.blocks(texts, key[1])
        return self._blocks[key]

    def tokens(self, texts: TextSet) -> Sequence[Sequence[int]]:  # type: ignore[override]  # blocks
        """Of each block."""
        return self.blocks(texts)  # type: ignore[return-value]  # it has a length and items

    def lessons(self, texts: TextSet) -> BlockExamples:  # type: ignore[override]  # blocks
        """``texts`` and their next tokens."""
        return lessons.examples_of(self.blocks(texts))

    def taught(self, *teachers: str) -> BlockExamples:  # type: ignore[override]  # blocks
        """The proxy texts, and what the teacher in a file of the run says to those rows that it was asked;
        the same with several teachers one after the other."""
        blocks, asked = self._asked()
        files = [TopKFile.open(self.session.run.path(teacher)) for teacher in teachers]
        return lessons.repeated(lessons.examples_of(blocks, Chained(files), asked), len(files), len(asked))

    def proxy_examples(self) -> int:
        """How many blocks a pass over the proxy texts has."""
        return len(self._asked()[0] if self._translation is None else self._translation.client.blocks)

    @cached_property
    def _translation(self) -> Translation | None:
        """Where this model has another tokenizer than the student."""
        question, proxy = self.session.query, self.session.splits.proxy
        assert question.reader is not None, "the task has a reader"
        if fingerprint(self.specialist.reader.tokenizer) == question.fingerprint:
            return None
        client = Side(self.specialist.reader, proxy, self.blocks(proxy), self.name)
        student = Side(question.reader, proxy, self._asked()[0], "student.model")
        way = self.session.config.language.alignment
        return Translation(client, student, self.session.run.path("maps"), way)

    def _asked(self) -> tuple[PackedTexts, Tensor]:
        question = self.session.query
        assert question.blocks is not None, "the task has blocks"
        assert question.rows is not None, "and rows"
        return question.blocks, question.rows

    def digested(  # type: ignore[override]  # blocks
        self, own: BlockExamples, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer, target: str
    ) -> BlockExamples:
        """``own``, and those blocks ``chosen`` of the proxy texts with what the teacher said to them."""
        if self._translation is not None:
            proxy = self._translated(self._translation, chosen, stored)
            if target == "hard" and proxy.teacher is not None:
                proxy = lessons.hardened(proxy)
            return lessons.together(own, lessons.some(proxy, chosen.tolist()))
        blocks, asked = self._asked()
        picked = np.flatnonzero(np.isin(asked.numpy() // (blocks.length - 1), chosen))
        teacher = TopK.cat(list(stored.picked(encoding.topk, picked)))
        proxy = lessons.examples_of(blocks, teacher, asked[torch.from_numpy(picked)])
        if target == "hard":
            proxy = lessons.hardened(proxy)
        return lessons.together(own, lessons.some(proxy, chosen.tolist()))

    def _translated(
        self, translation: Translation, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer
    ) -> BlockExamples:
        """The proxy texts as this model reads them, with what the teacher said to its blocks ``chosen``."""
        blocks, asked = translation.client.blocks, self._asked()[1].numpy()
        here = np.isin(np.arange(blocks.rows) // (blocks.length - 1), chosen)
        wanted = np.flatnonzero(here & blocks.wanted)
        picked = np.flatnonzero(np.isin(asked, translation.taught_by(wanted)))
        if not len(picked):
            return lessons.examples_of(blocks)
        said = TopK.cat(list(stored.picked(encoding.topk, picked)))
        k = min(stored.spec.k, self.specialist.reader.vocab_size)
        teacher, rows = translation.teacher(said, asked[picked], wanted, k)
        return lessons.examples_of(blocks, teacher, torch.from_numpy(rows))

    @property
    def _vocab_size(self) -> int:
        return self.specialist.reader.vocab_size

    def compressed(
        self, spec: RoundSpec, seed: int, start: int, stop: int, on_step: ProgressCallback | None = None
    ) -> payload.Answers:
        """Rows from ``start`` to ``stop`` of what the model says to the proxy texts, in the round's codec."""
        blocks, whole = self._asked()
        asked = whole[start:stop].numpy()
        if self._translation is None:
            said = self._logits(self._shown(blocks, whole.numpy()), asked, on_step)
            return encoding.compress_parts(said, spec, seed)
        rows = self._translation.rows(asked)
        kept = kept_before(spec.k, self.specialist.reader.vocab_size)
        said = self._logits(self._translation.client.blocks, rows, on_step)
        own = (topk_compress(logits, kept, id_order=False) for logits in said)
        return encoding.compress_parts(self._translation.answers(own, rows, asked, spec.k), spec, seed)

    def projection(self) -> Json | None:
        """See ``Learner``."""
        return None if self._translation is None else self._translation.counted()

    def figures(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        """How well the model predicts ``texts``."""
        blocks = self.blocks(texts)
        rows = np.flatnonzero(blocks.wanted)
        targets, at, total = torch.from_numpy(blocks.targets[rows]), 0, 0.0
        for logits in self._logits(blocks, rows, on_step):
            wanted = targets[at : at + len(logits)]
            nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
            total += float(nats.double().sum())
            at += len(logits)
        size = self.specialist.reader.bytes(texts)
        return metrics.language(total, len(rows), size).as_dict()

    def _shown(self, blocks: PackedTexts, rows: NDArray[np.int64]) -> PackedTexts:
        """``blocks`` as the model reads them when it is asked ``rows``."""
        return blocks

    def _states(self, ids: Tensor, attention: Tensor, places: Tensor) -> Tensor:
        """What the head multiplies, ``[n, H]``, for the tokens behind ``places`` of ``ids [B * L]``."""
        return hidden_states(self.model, ids).flatten(0, 1)[places]

    def _logits(
        self, blocks: PackedTexts, rows: NDArray[np.int64], on_step: ProgressCallback | None
    ) -> Iterator[Tensor]:
        """Logits ``[m, V]`` of ``rows``, which ascend, some rows at a time."""
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
            if math.isnan(float(logits.sum())):
                raise ModelError(
                    f"{self.name}: the model answers NaN: training diverged; lower the learning rate"
                )
            yield logits
