"""A model that points at answers as the methods use it: two rows a question, over characters of passages."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from feddistill import metrics, payload
from feddistill.alignment.rows import Said, collect
from feddistill.config.models import ModelConfig
from feddistill.errors import ModelError
from feddistill.federation import answer_files, encoding
from feddistill.modelio import inference
from feddistill.modelio.passages import QAWindow, likeliest
from feddistill.models import reading
from feddistill.seeds import derive
from feddistill.store.logit_files import Chained, TopKFile
from feddistill.tasks.learner import Learner
from feddistill.training import spans as lessons
from feddistill.training.blocks import NOT_TAUGHT
from feddistill.training.spans import NO_ANSWER, SpanExamples
from feddistill.types import NO_LABEL, ProgressCallback, RoundSpec, TextSet
from feddistill_kernels import TopK

PIECE = 1024
"""Questions whose answers are in memory at a time."""


class QuestionAnswering(Learner):
    """See ``Learner``."""

    specialist: reading.PassageReader  # type: ignore[assignment]  # reads pages, not texts

    def _build(self, config: ModelConfig) -> reading.PassageReader:  # type: ignore[override]  # pages
        self._pages: dict[str, list[QAWindow]] = {}
        settings = self.session.config
        seed, public = derive(settings.seed, "init", self.name), self.session.splits.proxy.texts
        return reading.build(config, settings.question_answering, seed, self.name, public)

    def pages(self, texts: TextSet) -> list[QAWindow]:
        """``texts`` as this model reads them; kept, as every round asks for them again."""
        if texts.name not in self._pages:
            self._pages[texts.name] = self.specialist.pages(texts)
        return self._pages[texts.name]

    def tokens(self, texts: TextSet) -> list[list[int]]:
        """Of each page."""
        return [page.ids for page in self.pages(texts)]

    def lessons(self, texts: TextSet) -> SpanExamples:  # type: ignore[override]  # pages
        """``texts`` and the answers that they have."""
        pages = self.pages(texts)
        known = texts.answers or (None,) * len(texts)
        return SpanExamples(pages, lessons.places_of(pages, known))

    def taught(self, *teachers: str) -> SpanExamples:  # type: ignore[override]  # pages
        """The proxy texts with the answers that the server knows and those of the teacher in a file of the
        run; the same with several teachers one after the other."""
        own, count = self.lessons(self.session.splits.proxy), len(teachers)
        files = [TopKFile.open(self.session.run.path(teacher)) for teacher in teachers]
        return SpanExamples(
            [*own.pages] * count,
            own.labels.repeat(count, 1),
            Chained(files),
            torch.arange(count * len(own.pages)),
        )

    def digested(  # type: ignore[override]  # pages
        self, own: SpanExamples, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer, target: str
    ) -> SpanExamples:
        """``own``, and those questions ``chosen`` of the proxy set with what the teacher said to them."""
        pages = self.pages(self.session.splits.proxy)
        rows = np.stack([2 * chosen, 2 * chosen + 1], 1).ravel()
        teacher = TopK.cat(list(stored.picked(encoding.topk, rows)))
        unknown = torch.full((len(chosen), 2), NO_LABEL)
        taught = torch.arange(len(chosen))
        said = (teacher.log_probs > -torch.inf).any(-1).view(-1, 2).all(-1)
        taught[~said] = NOT_TAUGHT
        proxy = SpanExamples([pages[row] for row in chosen], unknown, teacher, taught)
        return lessons.together(own, lessons.hardened(proxy) if target == "hard" else proxy)

    def compressed(
        self, spec: RoundSpec, seed: int, start: int, stop: int, on_step: ProgressCallback | None = None
    ) -> payload.Answers:
        """Rows from ``start`` to ``stop`` of what the model says to the proxy texts, in the round's codec."""
        return encoding.compress_parts(self._said(spec, start, stop, on_step), spec, seed)

    def _said(
        self, spec: RoundSpec, start: int, stop: int, on_step: ProgressCallback | None
    ) -> Iterator[TopK]:
        pages = self.pages(self.session.splits.proxy)
        last = -(-stop // 2)
        for first in range(start // 2, last, PIECE):
            piece = pages[first : min(first + PIECE, last)]
            rows = of_characters(piece, self._logits(piece, on_step), spec.k, spec.vocab_size)
            yield rows[max(start - 2 * first, 0) : stop - 2 * first]

    def _logits(self, pages: list[QAWindow], on_step: ProgressCallback | None) -> list[torch.Tensor]:
        found = inference.answer_pages(
            self.model,
            pages,
            pad_id=self.specialist.pad_id,
            types=self.specialist.types,
            batch_size=self.session.config.clients.eval_batch_size,
            bf16=self.session.bf16,
            meter=self.meter,
            on_step=on_step,
        )
        if any(logits.isnan().any() for logits in found):
            raise ModelError(
                f"{self.name}: the model answers NaN: training diverged; lower the learning rate"
            )
        return found

    def figures(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        """How well the spans that the model points at answer ``texts``."""
        pages, longest = self.pages(texts), self.session.config.question_answering.max_answer_tokens
        known, given, golds = texts.answers or (None,) * len(texts), [], []
        for row, (page, logits) in enumerate(zip(pages, self._logits(pages, on_step), strict=True)):
            _, passage = texts.question(row)
            start, end = logits
            score, first, last = likeliest(start, end, page, longest)
            nothing = self.specialist.unanswerable and score < float(logits[:, page.none].double().sum())
            given.append("" if nothing else passage[page.starts[first] : page.ends[last]])
            golds.append([passage[a:b] for a, b in known[row] or ()])
        return metrics.reading(given, golds, unanswerable=self.specialist.unanswerable).as_dict()


def of_characters(pages: list[QAWindow], logits: list[torch.Tensor], k: int, vocab_size: int) -> TopK:
    """What is said of tokens, said of characters: two rows a page, the likeliest ``k`` ids first.

    Args:
        pages: ``n`` of them.
        logits: ``[2, T]`` of each, ``-inf`` where a token can be neither.
        k: Entries of a row.
        vocab_size: Characters of the longest passage, and one more: that there is no answer.
    """
    count = 2 * len(pages)
    said = Said(np.arange(count), np.ones(count), np.zeros(count))
    for number, (page, both) in enumerate(zip(pages, logits, strict=True)):
        mass = both.double().softmax(-1).numpy()
        tokens = np.flatnonzero(page.choices)
        for side, edge in enumerate((page.starts + 1, page.ends)):
            ids = np.where(tokens == page.none, NO_ANSWER, edge[tokens])
            said.parts.append((np.full(len(tokens), 2 * number + side), ids, mass[side, tokens]))
    return collect(said, count, k, vocab_size, 0.0).rows
