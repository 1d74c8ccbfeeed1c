"""Evaluation metrics: classification, language modelling, SQuAD."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Classification:
    """Metrics of a classifier on a labelled set."""

    accuracy: float
    macro_f1: float
    """Unweighted mean of F1 over the classes in the set."""
    mcc: float
    """Matthews correlation coefficient: 0 is chance, for any class sizes."""
    ece: float
    """Expected calibration error over 15 bins of confidence (Guo et al., ICML 2017)."""
    cross_entropy: float
    """Mean over texts, in nats."""

    def as_dict(self) -> dict[str, float]:
        """By name, rounded to six digits, as in the records."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Language:
    """Metrics of a causal language model on a set of texts."""

    cross_entropy: float
    """Mean over tokens, in nats; not comparable between tokenizers."""
    perplexity: float
    """``exp(cross_entropy)``."""
    bits_per_byte: float
    """Bits of all tokens, end tokens included, over the bytes of the texts in UTF-8; comparable between
    tokenizers that drop no characters."""

    def as_dict(self) -> dict[str, float]:
        """By name, rounded to six digits, as in the records."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Masked:
    """Metrics of a masked language model on the masked tokens of a set of texts."""

    cross_entropy: float
    """Mean over masked tokens, in nats."""
    perplexity: float
    """``exp(cross_entropy)``."""
    accuracy: float
    """Share of masked tokens that are predicted as the likeliest."""

    def as_dict(self) -> dict[str, float]:
        """By name, rounded to six digits, as in the records."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Reading:
    """SQuAD's metrics of predicted answers."""

    f1: float
    """Mean over questions of the word F1 with the best right answer."""
    exact_match: float
    """Share of predictions that equal a right answer after normalisation."""

    def as_dict(self) -> dict[str, float]:
        """By name, rounded to six digits, as in the records."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def reading(given: Sequence[str], golds: Sequence[Sequence[str]], *, unanswerable: bool) -> Reading:
    """Compare answers ``given`` with the right answers ``golds``; see ``squad``."""
    exact_match, mean_f1 = _means(_squad_scores(given, golds, no_answer=unanswerable))
    return Reading(mean_f1 / 100, exact_match / 100)


def masked(nats: float, right: int, tokens: int) -> Masked:
    """Metrics of ``tokens`` with a total of ``nats``, ``right`` of which are predicted as the likeliest.

    >>> masked(4 * math.log(2), 1, 4)
    Masked(cross_entropy=0.69..., perplexity=2.0, accuracy=0.25)
    """
    mean = nats / tokens
    return Masked(mean, math.exp(min(mean, 700.0)), right / tokens)


def language(nats: float, tokens: int, size: int) -> Language:
    """Metrics of ``tokens`` with a total of ``nats``, in texts of ``size`` bytes.

    >>> language(8 * math.log(2), 4, 2)
    Language(cross_entropy=1.38..., perplexity=4.0, bits_per_byte=4.0)
    """
    mean = nats / tokens
    return Language(mean, math.exp(min(mean, 700.0)), nats / math.log(2) / size)


def classification(log_probs: NDArray[np.float32], labels: NDArray[np.int64]) -> Classification:
    """Compare predictions ``[N, V]`` (log-probabilities) with labels ``[N]``."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guess = log_probs.argmax(1)
    present = np.unique(labels)
    return Classification(
        accuracy=float(accuracy_score(labels, guess)),
        macro_f1=float(f1_score(labels, guess, labels=present, average="macro", zero_division=0.0)),
        mcc=float(matthews_corrcoef(labels, guess)),
        ece=_calibration_error(np.exp(log_probs.max(1)), guess == labels),
        cross_entropy=float(-log_probs[np.arange(len(labels)), labels].astype(np.float64).mean()),
    )


def _calibration_error(confidence: NDArray[np.float32], right: NDArray[np.bool_], bins: int = 15) -> float:
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(place, right - confidence.astype(np.float64), minlength=bins)
    return float(np.abs(gap).sum() / len(right))


PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space.

    >>> normalised("The  Panthers' (defense)!")
    'panthers defense'
    """
    plain = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact(given: str, gold: str) -> float:
    """1 if both are equal after normalisation, else 0."""
    return float(normalised(given) == normalised(gold))


def f1(given: str, gold: str, *, no_answer: bool = False) -> float:
    """Harmonic mean of precision and recall over words; with ``no_answer``, 1 if both have no words."""
    words, right = normalised(given).split(), normalised(gold).split()
    if no_answer and not words and not right:
        return 1.0
    common = sum((Counter(words) & Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(right)
    return 2 * precision * recall / (precision + recall)


def squad(
    given: Sequence[str], golds: Sequence[Sequence[str]], *, no_answer: bool = False
) -> dict[str, float]:
    """SQuAD's exact match and F1 in per cent over all questions, the best of each question's golds counting.

    Args:
        given: A prediction for each question; empty for "no answer".
        golds: Each question's right answers. With ``no_answer`` (version 2.0) golds that are empty when
            normalised do not count, and a question without golds is right when it is left unanswered.
        no_answer: Rules of version 2.0; also returns the metrics of questions with and without an answer.
    """
    scores = _squad_scores(given, golds, no_answer=no_answer)
    groups = {"": scores}
    for score in scores if no_answer else ():
        groups.setdefault("has_answer_" if score.has_answer else "no_answer_", []).append(score)
    return {
        f"{prefix}{name}": value
        for prefix, group in groups.items()
        for name, value in zip(("exact_match", "f1"), _means(group), strict=True)
    }


@dataclass(frozen=True, slots=True)
class _Score:
    exact_match: float
    f1: float
    has_answer: bool


def _squad_scores(given: Sequence[str], golds: Sequence[Sequence[str]], *, no_answer: bool) -> list[_Score]:
    scores = []
    for answer, right in zip(given, golds, strict=True):
        kept = [gold for gold in right if normalised(gold)] if no_answer else list(right)
        references = kept or [""]
        score = _Score(
            max(exact(answer, gold) for gold in references),
            max(f1(answer, gold, no_answer=no_answer) for gold in references),
            bool(kept),
        )
        scores.append(score)
    return scores


def _means(scores: Sequence[_Score]) -> tuple[float, float]:
    """Mean exact match and F1, in per cent, rounded to six digits."""
    exact_match, mean_f1 = (
        round(100 * sum(values) / len(scores), 6)
        for values in zip(*((score.exact_match, score.f1) for score in scores), strict=True)
    )
    return exact_match, mean_f1
