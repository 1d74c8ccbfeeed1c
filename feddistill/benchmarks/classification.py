"""Classification benchmarks, for classifiers and for causal language models."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from feddistill import metrics
from feddistill.accounting import FlopMeter
from feddistill.benchmarks.generation import fitted
from feddistill.benchmarks.likelihood import continuation, encode, log_likelihoods
from feddistill.config.presets import Preset
from feddistill.data import benchmark
from feddistill.errors import ConfigError, DataError
from feddistill.modelio import inference
from feddistill.runs.trained_models import Student
from feddistill.store.run_directory import Json
from feddistill.types import ProgressCallback

LINKS = {"cause": "because", "effect": "therefore"}
"""COPA's questions, and the word that joins premise and choice for each."""


def by_answers(
    student: Student, preset: Preset, columns: benchmark.Columns, on_step: ProgressCallback
) -> Json:
    """Metrics of a classifier, whose labels must include the benchmark's classes by name.

    Predictions of labels that the benchmark does not have count as wrong.

    Raises:
        DataError: A class of the benchmark is not among the classifier's labels.
        ConfigError: The classifier was trained on pairs of texts, and benchmarks are single texts.
    """
    if student.pairs:
        raise ConfigError(
            f"{student.name} reads pairs of texts (pair_column), and those of {preset.name} are single; "
            "--texts and --pair-column name a file of pairs"
        )
    unknown = [label for label in preset.labels if label not in student.labels]
    if unknown:
        raise DataError(
            f"{preset.name} has the labels {', '.join(preset.labels)}; "
            f"{student.name} has {', '.join(student.labels)}"
        )
    texts = benchmark.texts(preset, columns)
    answers = inference.answer(
        student.model,
        student.specialist.encode(texts),
        len(student.labels),
        pad_id=student.specialist.pad_id,
        batch_size=student.batch_size,
        bf16=student.bf16,
        meter=FlopMeter(student.model),
        on_step=on_step,
    ).numpy()
    return figures(preset, answers, benchmark.labels(preset, columns, preset.name), student.labels)


def by_likelihood(
    student: Student, preset: Preset, columns: benchmark.Columns, on_step: ProgressCallback
) -> Json:
    """Metrics of a causal language model: predict the class with the most likely name after the prompt.

    Zero-shot; the log-likelihood is summed over the tokens of `` name``, as for lm-evaluation-harness's
    ``acc``.
    """
    answers = [f" {answer}" for answer in preset.answers]
    longest = max(len(encode(student, answer)) for answer in answers) + 1
    room = student.max_tokens - longest
    prompts = [
        (
            preset.prompt.format(**row)
            if preset.cut is None
            else fitted(student, preset.prompt, row, preset.cut, room),
            answers,
        )
        for row in benchmark.rows(preset, columns)
    ]
    scores = _scores(student, prompts, on_step)
    labels = benchmark.labels(preset, columns, preset.name)
    return figures(preset, scores, labels, preset.labels)


def by_choice(
    student: Student, preset: Preset, columns: benchmark.Columns, on_step: ProgressCallback
) -> Json:
    """COPA by a causal language model: the more likely choice after the premise and its joining word."""
    prompts = []
    for number, row in enumerate(benchmark.rows(preset, columns)):
        if row["question"] not in LINKS:
            raise DataError(
                f"{preset.name}: row {number} has question = {row['question']!r}, not cause or effect"
            )
        context = f"{row['premise'].removesuffix('.')} {LINKS[row['question']]}"
        choices = [row["choice1"], row["choice2"]]
        prompts.append((context, [f" {text[:1].lower()}{text[1:]}" for text in choices]))
    scores = _scores(student, prompts, on_step)
    return figures(preset, scores, benchmark.labels(preset, columns, preset.name), preset.labels)


def figures(
    preset: Preset, log_probs: NDArray[np.float32], labels: Sequence[str], names: Sequence[str]
) -> Json:
    """Accuracy, macro-F1, Matthews correlation, calibration; F1 of one class if the benchmark ranks by it."""
    from sklearn.metrics import f1_score

    index = {name: place for place, name in enumerate(names)}
    right = np.array([index[label] for label in labels], np.int64)
    found: Json = dict(metrics.classification(log_probs, right).as_dict())
    if preset.positive is not None:
        place = index[preset.positive]
        score = f1_score(right == place, log_probs.argmax(1) == place, zero_division=0.0)
        found["f1"] = round(float(score), 6)
    return found


def _scores(
    student: Student, prompts: Sequence[tuple[str, Sequence[str]]], on_step: ProgressCallback
) -> NDArray[np.float32]:
    """Log-probabilities normalised over the choices, ``[N, choices]``."""
    scored = [continuation(student, context, text) for context, texts in prompts for text in texts]
    sums = log_likelihoods(student, scored, on_step).reshape(len(prompts), -1)
    return np.asarray(sums - np.logaddexp.reduce(sums, axis=1, keepdims=True), np.float32)
