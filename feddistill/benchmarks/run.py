"""Evaluation of a trained model on a benchmark preset."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from feddistill import metrics
from feddistill.benchmarks import classification, overlap
from feddistill.benchmarks.extraction import extract
from feddistill.benchmarks.generation import fitted, generate
from feddistill.benchmarks.likelihood import Scored, encode, log_likelihoods, plain, windows
from feddistill.config.presets import Kind, Preset
from feddistill.data import benchmark
from feddistill.errors import ConfigError, DataError
from feddistill.models.tokenizers import first_token_ends
from feddistill.progress import NoProgress, Progress
from feddistill.runs.trained_models import Student
from feddistill.store.run_directory import Json
from feddistill.types import ProgressCallback

__all__ = ["Request", "evaluate", "language"]

ANSWER_TOKENS = 32
"""Maximum tokens of a generated answer to a question."""
SUMMARY_TOKENS = 128
STOP = ("\n",)
HARD = "squad_v2"
"""Preset in which some questions have no answer."""
UNANSWERABLE = "unanswerable"


@dataclass(frozen=True, slots=True)
class Request:
    """A benchmark and how to evaluate on it."""

    preset: Preset
    path: Path | None = None
    """A local folder in the hub's layout; ``None`` for the hub."""
    limit: int | None = None
    """Evaluate only the first ``limit`` examples."""
    window: int | None = None
    """For ``language``: context window in tokens, including the predicted one; ``None`` for the model's
    maximum length."""
    stride: int | None = None
    """For ``language``: tokens by which the window advances; ``None`` for half a window."""


Measure = Callable[[Student, Request, benchmark.Columns, ProgressCallback], Json]


def evaluate(student: Student, request: Request, progress: Progress | None = None) -> Json:
    """Evaluate ``student`` on a benchmark; returns metrics, number of examples and ranking metric.

    Raises:
        DataError: The data cannot be loaded, or have a label that the student lacks.
        ConfigError: The benchmark is for another kind of model, or the window is invalid.
    """
    preset = request.preset
    measure = MEASURES.get((preset.kind, student.task))
    if measure is None:
        wanted = [task for kind, task in MEASURES if kind == preset.kind]
        raise ConfigError(
            f"{preset.name} needs a model for {' or '.join(wanted)}; {student.name} is for {student.task}"
        )
    if preset.kind != "language" and (request.window or request.stride):
        raise ConfigError(
            f"window and stride apply to language modelling, e.g. wikitext-2, not to {preset.name}"
        )
    progress = progress or NoProgress()
    with progress.step(f"read {preset.name}"):
        columns = benchmark.read(preset, preset.measured, request.path, None, preset.name)
        if request.limit is not None and preset.kind != "language":
            columns = {key: values[: request.limit] for key, values in columns.items()}
    with progress.step(f"measure {preset.name}") as on_step:
        measured = measure(student, request, columns, on_step)
    return {
        "model": student.name,
        "benchmark": preset.name,
        "split": preset.measured,
        "ranks_by": preset.metric,
        **({} if preset.kind == "language" else {"examples": len(columns[preset.columns[0]])}),
        **measured,
        **({"note": preset.note} if preset.note else {}),
    }


def language(student: Student, pages: list[str], request: Request, on_step: ProgressCallback) -> Json:
    """Perplexity of whole documents in overlapping windows.

    ``perplexity`` is per token, ``bits_per_byte`` per byte of the detokenised text that the model reads, and
    ``word_perplexity`` per word of the original page, counted as in lm-evaluation-harness. The first token of
    a page is predicted from the token that begins texts in training; without one, it is left out.
    """
    window = request.window or student.max_tokens
    if not 2 <= window <= student.max_tokens:
        raise ConfigError(f"window = {window}: {student.name} reads 2 to {student.max_tokens} tokens")
    stride = request.stride or max(1, window // 2)
    if not 1 <= stride < window:
        raise ConfigError(f"stride = {stride} must be from 1 to {window - 1}, less than the window")
    bounds = student.bounds
    texts = [benchmark.detokenise(page) for page in pages]
    scored: list[Scored] = []
    for text in texts:
        tokens = plain(student, text)
        if len(tokens) < (2 if bounds.start is None else 1):
            raise DataError(f"{request.preset.name}: a page has no tokens to predict")
        scored.extend(windows(tokens, bounds, window, stride))
    nats = -float(log_likelihoods(student, scored, on_step).sum())
    tokens_read = sum(one.count for one in scored)
    ignored = first_token_ends(student.tokenizer, texts) if bounds.start is None else [0] * len(texts)
    size = sum(len(text[first:].encode()) for text, first in zip(texts, ignored, strict=True))
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    return {
        "documents": len(pages),
        "tokens": tokens_read,
        "bytes": size,
        "words": words,
        "window": window,
        "stride": stride,
        "perplexity": round(_exp(nats / tokens_read), 6),
        "word_perplexity": round(_exp(nats / words), 6),
        "bits_per_byte": round(nats / size / math.log(2), 6),
    }


def _language(
    student: Student, request: Request, columns: benchmark.Columns, on_step: ProgressCallback
) -> Json:
    return language(student, benchmark.pages(columns["text"])[: request.limit], request, on_step)


def _questions(
    student: Student, request: Request, columns: benchmark.Columns, on_step: ProgressCallback
) -> Json:
    """SQuAD by generation with a causal language model, up to the end of the line."""
    given = _written(student, request.preset, columns, ANSWER_TOKENS, STOP, on_step)
    if request.preset.name == HARD:
        given = ["" if metrics.normalised(text) == UNANSWERABLE else text for text in given]
    return _spans(given, request.preset, columns)


def _passages(
    student: Student, request: Request, columns: benchmark.Columns, on_step: ProgressCallback
) -> Json:
    """SQuAD by extractive question answering."""
    questions, hard = [text.strip() for text in columns["question"]], request.preset.name == HARD
    given = extract(student, questions, columns["context"], on_step, unanswerable=hard)
    return _spans(given, request.preset, columns)


def _spans(given: list[str], preset: Preset, columns: benchmark.Columns) -> Json:
    return metrics.squad(given, benchmark.golds(columns, preset.name), no_answer=preset.name == HARD)


def _summaries(
    student: Student, request: Request, columns: benchmark.Columns, on_step: ProgressCallback
) -> Json:
    right = columns[request.preset.label_column]
    given = _written(student, request.preset, columns, SUMMARY_TOKENS, ("\n\n",), on_step)
    return {**overlap.rouge(given, right), **overlap.bleu(given, right)}


def _written(
    student: Student,
    preset: Preset,
    columns: benchmark.Columns,
    new_tokens: int,
    stop: tuple[str, ...],
    on_step: ProgressCallback,
) -> list[str]:
    assert preset.cut is not None, "presets answered by generation have a column to truncate"
    room = student.max_tokens - new_tokens
    if room < 1:
        raise ConfigError(f"{student.name} reads {student.max_tokens} tokens, too few to write {new_tokens}")
    prompts = [
        encode(student, fitted(student, preset.prompt, row, preset.cut, room))
        for row in benchmark.rows(preset, columns)
    ]
    return generate(student, prompts, new_tokens=new_tokens, stop=stop, on_step=on_step)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _simple(measure: Callable[[Student, Preset, benchmark.Columns, ProgressCallback], Json]) -> Measure:
    return lambda student, request, columns, on_step: measure(student, request.preset, columns, on_step)


MEASURES: dict[tuple[Kind, str], Measure] = {
    ("classification", "classification"): _simple(classification.by_answers),
    ("classification", "causal_lm"): _simple(classification.by_likelihood),
    ("choice", "causal_lm"): _simple(classification.by_choice),
    ("language", "causal_lm"): _language,
    ("question_answering", "causal_lm"): _questions,
    ("question_answering", "question_answering"): _passages,
    ("summary", "causal_lm"): _summaries,
}
"""Evaluation function by kind of benchmark and task of the model."""
