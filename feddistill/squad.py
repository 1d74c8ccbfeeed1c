"""SQuAD's exact match and F1, by the rules of its official scripts (versions 1.1 and 2.0)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

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


def figures(
    given: Sequence[str], golds: Sequence[Sequence[str]], *, no_answer: bool = False
) -> dict[str, float]:
    """Per cent over all questions, the best of each question's golds counting.

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
