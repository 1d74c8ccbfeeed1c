"""What can be learned, and by which figure one model is better than another. This does not import torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A task's figures."""

    figures: tuple[str, ...]
    """All that are recorded."""
    shown: Mapping[str, str]
    """Those of a table, with the words above them."""
    decides: str
    """By which models are selected, on validation."""
    words: str
    """What that is called in a sentence."""
    larger_is_better: bool
    percent: bool
    """Whether it is a share, which studies give in per cent."""
    row: str
    """What a row of an answer is about."""
    choices: str
    """What a row is over."""

    def reaches(self, value: float, target: float) -> bool:
        """Whether ``value`` is as good as ``target``."""
        return value >= target if self.larger_is_better else value <= target

    @property
    def axis(self) -> str:
        """What it is called beside a figure."""
        return f"{self.words} on the test set{', %' if self.percent else ''}"

    def read(self, figures: Metrics) -> float:
        """What decides, as studies give it.

        >>> TASKS["classification"].read({"accuracy": 0.5})
        50.0
        """
        return float(figures[self.decides]) * (100 if self.percent else 1)

    def better(self, new: Metrics, old: Metrics) -> bool:
        """Whether figures are better than others; equal ones are not."""
        now, then = float(new[self.decides]), float(old[self.decides])
        return now > then if self.larger_is_better else now < then

    def best(self, records: Iterable[dict[str, Any]], on: str = "validation") -> dict[str, Any]:
        """The first of those records that are best on a set.

        >>> TASKS["causal_lm"].best([{"test": {"bits_per_byte": b}} for b in (2.0, 1.5)], "test")
        {'test': {'bits_per_byte': 1.5}}
        """
        first, *others = records
        for record in others:
            if self.better(record[on], first[on]):
                first = record
        return first


TASKS: dict[str, Task] = {
    "classification": Task(
        figures=("accuracy", "macro_f1", "mcc", "ece", "cross_entropy"),
        shown={"accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC", "ece": "ECE"},
        decides="accuracy",
        words="accuracy",
        larger_is_better=True,
        percent=True,
        row="proxy text",
        choices="classes",
    ),
    "causal_lm": Task(
        figures=("cross_entropy", "perplexity", "bits_per_byte"),
        shown={"bits_per_byte": "bits/byte", "perplexity": "perplexity", "cross_entropy": "nats/token"},
        decides="bits_per_byte",
        words="bits per byte",
        larger_is_better=False,
        percent=False,
        row="token",
        choices="tokens",
    ),
    "masked_lm": Task(
        figures=("cross_entropy", "perplexity", "accuracy"),
        shown={"cross_entropy": "nats/token", "perplexity": "perplexity", "accuracy": "accuracy"},
        decides="cross_entropy",
        words="nats a hidden token",
        larger_is_better=False,
        percent=False,
        row="hidden token",
        choices="tokens",
    ),
    "question_answering": Task(
        figures=("f1", "exact_match"),
        shown={"f1": "F1", "exact_match": "exact match"},
        decides="f1",
        words="F1",
        larger_is_better=True,
        percent=True,
        row="start or end",
        choices="characters",
    ),
}


LANGUAGE = ("causal_lm", "masked_lm")
"""Tasks whose classes are tokens."""


COMPRESSED = (*LANGUAGE, "question_answering")
"""Tasks whose answers are too long to be dense."""


DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    task: {
        "payload": {"codec": "topk"},
        "distill": {"temperature": 1.0},
        "clients": {"codistillation": {"target": "soft"}},
    }
    for task in COMPRESSED
}
"""By task, defaults that are not the fields' own."""


def task_named(stored: str) -> Task:
    """The task that a result names; results from before 0.1.0 have ``reading`` for question answering."""
    return TASKS["question_answering" if stored == "reading" else stored]
