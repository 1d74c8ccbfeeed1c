"""How good answers are: accuracy, macro-F1, Matthews correlation, calibration; bits per byte; spans."""

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
    """Figures on one labelled set."""

    accuracy: float
    macro_f1: float
    """Mean over the classes that the set has, each counting alike."""
    mcc: float
    """Matthews correlation coefficient: 0 is chance, whatever the class sizes."""
    ece: float
    """Expected calibration error over 15 bins of confidence (Guo et al., ICML 2017)."""
    cross_entropy: float
    """Mean nats of the true label."""

    def as_dict(self) -> dict[str, float]:
        """By name, rounded to six digits: what the records hold."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Language:
    """Figures of a language model on one set of texts."""

    cross_entropy: float
    """Mean nats of the true next token; tokens differ from tokenizer to tokenizer."""
    perplexity: float
    """``exp(cross_entropy)``."""
    bits_per_byte: float
    """Bits of all tokens, those that end texts too, over the texts' bytes in UTF-8: comparable between
    tokenizers that leave no character out."""

    def as_dict(self) -> dict[str, float]:
        """By name, rounded to six digits: what the records hold."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Masked:
    """Figures of a masked language model on the hidden tokens of one set of texts."""

    cross_entropy: float
    """Mean nats of the hidden token."""
    perplexity: float
    """``exp(cross_entropy)``."""
    accuracy: float
    """Share of the hidden tokens that are the likeliest ones."""

    def as_dict(self) -> dict[str, float]:
        """By name, rounded to six digits: what the records hold."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Reading:
    """Figures of spans that answer questions, by SQuAD's rules."""

    f1: float
    """Mean over questions of the F1 of the words, with the right answer that is nearest."""
    exact_match: float
    """Share of the answers that are, normalised, a right one."""

    def as_dict(self) -> dict[str, float]:
        """By name, rounded to six digits: what the records hold."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def reading(given: Sequence[str], golds: Sequence[Sequence[str]], *, unanswerable: bool) -> Reading:
    """Of answers ``given`` to questions whose right answers are ``golds``; see ``squad``."""
    found = squad(given, golds, no_answer=unanswerable)
    return Reading(found["f1"] / 100, found["exact_match"] / 100)


def masked(nats: float, right: int, tokens: int) -> Masked:
    """Of ``tokens`` that cost ``nats`` together, ``right`` of which are the likeliest.

    >>> masked(4 * math.log(2), 1, 4)
    Masked(cross_entropy=0.69..., perplexity=2.0, accuracy=0.25)
    """
    mean = nats / tokens
    return Masked(mean, math.exp(min(mean, 700.0)), right / tokens)


def language(nats: float, tokens: int, size: int) -> Language:
    """Of ``tokens`` that cost ``nats`` together, of texts of ``size`` bytes.

    >>> language(8 * math.log(2), 4, 2)
    Language(cross_entropy=1.38..., perplexity=4.0, bits_per_byte=4.0)
    """
    mean = nats / tokens
    return Language(mean, math.exp(min(mean, 700.0)), nats / math.log(2) / size)


def classification(log_probs: NDArray[np.float32], labels: NDArray[np.int64]) -> Classification:
    """Compare answers ``[N, V]`` (log-probabilities) with labels ``[N]``."""
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
    """1 where both are the same when normalised."""
    return float(normalised(given) == normalised(gold))


def f1(given: str, gold: str, *, no_answer: bool = False) -> float:
    """Harmonic mean of precision and recall over the words; with ``no_answer`` 1 where neither has any."""
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
        given: An answer to each question; an empty one says that there is none.
        golds: Each question's right answers. With ``no_answer`` (version 2.0) golds that are empty when
            normalised do not count, and a question without golds is right when it is left unanswered.
        no_answer: Rules of version 2.0; figures of both kinds of questions are added.
    """
    found: dict[str, list[tuple[float, float]]] = {"": []}
    for answer, right in zip(given, golds, strict=True):
        kept = [gold for gold in right if normalised(gold)] if no_answer else list(right)
        of = kept or [""]
        scores = (
            max(exact(answer, gold) for gold in of),
            max(f1(answer, gold, no_answer=no_answer) for gold in of),
        )
        found[""].append(scores)
        if no_answer:
            found.setdefault("has_answer_" if kept else "no_answer_", []).append(scores)
    return {
        f"{kind}{name}": round(100 * sum(score[at] for score in scores) / len(scores), 6)
        for kind, scores in found.items()
        for at, name in enumerate(("exact_match", "f1"))
    }
