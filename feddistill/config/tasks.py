"""The tasks, one entry each: what settings, data, training, reports and model cards derive from.

A new task is one file in ``feddistill/tasks/`` and one entry here. Imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

Metrics = Mapping[str, Any]

Labels = Literal["class", "answer", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: its learner, its metrics, and what it allows."""

    learner: str
    """``module:Class``, a subclass of ``feddistill.tasks.learner.Learner``."""
    label: str
    """The task in a sentence, after "models for"."""
    metrics: tuple[str, ...]
    """Names of all metrics that are recorded."""
    shown: Mapping[str, str]
    """Metrics in tables, with their column heads."""
    decides: str
    """The metric by which models are selected on validation."""
    words: str
    """Name of that metric in a sentence."""
    larger_is_better: bool
    percent: bool
    """True if that metric is a share, which studies give in per cent."""
    row: str
    """What one row of a prediction is about."""
    choices: str
    """What a row is a distribution over, in the plural."""
    pipeline: str
    """``pipeline_tag`` of the model card."""
    labels: Labels = "class"
    """``class``: texts have class labels. ``answer``: texts are questions on passages, with answers.
    ``tokens``: the labels are the texts' own tokens; proxy texts have labels without ``labelled``."""
    dense: bool = True
    """True if predictions are over a few classes. Only then are allowed: the codec ``dense``, a temperature,
    ``distill.kind: mae``, rules and weights that are about classes, attacks, ``histogram_epsilon``."""
    new_head: bool = True
    """True if the model gets a head with random weights, which LoRA then trains whole."""
    frozen_cache: bool = True
    """True if ``frozen_cache_mb`` is allowed."""
    shares_steps: bool = False
    """True if runs of a study may share training steps (``tasks.step_cache``)."""
    generates: bool = False
    """True if the model writes text, as lm-evaluation-harness needs."""
    query_only: str | None = None
    """``module:Class`` of the learner of query-only models; ``None`` if a client cannot have one."""
    query_only_sources: tuple[str, ...] = ()
    """Kinds of model sources that a query-only model may have."""
    query_only_tokenizer: bool = False
    """True if a query-only model needs a tokenizer."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Settings, by dotted name, that must keep their defaults, and the rest of the error message."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of settings that differ from those of the fields."""
    heads: Mapping[str, str] = field(default_factory=dict)
    """Ends of transformers' architecture names, with the ``Auto`` class that loads them."""

    def reaches(self, value: float, target: float) -> bool:
        """True if ``value`` is at least as good as ``target``."""
        return value >= target if self.larger_is_better else value <= target

    @property
    def axis(self) -> str:
        """Label of the deciding metric on an axis of a plot."""
        return f"{self.words} on the test set{', %' if self.percent else ''}"

    def read(self, metrics: Metrics) -> float:
        """The deciding metric, in the unit that studies give.

        >>> TASKS["classification"].read({"accuracy": 0.5})
        50.0
        """
        return float(metrics[self.decides]) * (100 if self.percent else 1)

    def better(self, new: Metrics, old: Metrics) -> bool:
        """True if ``new`` is better than ``old``; False if they are equal."""
        now, then = float(new[self.decides]), float(old[self.decides])
        return now > then if self.larger_is_better else now < then

    def best(self, records: Iterable[dict[str, Any]], on: str = "validation") -> dict[str, Any]:
        """The first of the records that are best on a set.

        >>> TASKS["causal_lm"].best([{"test": {"bits_per_byte": b}} for b in (2.0, 1.5)], "test")
        {'test': {'bits_per_byte': 1.5}}
        """
        first, *others = records
        for record in others:
            if self.better(record[on], first[on]):
                first = record
        return first


MODULES = "feddistill.tasks"

_COMPRESSED: Mapping[str, Any] = {
    "payload": {"codec": "topk"},
    "distill": {"temperature": 1.0},
    "clients": {"codistillation": {"target": "soft"}},
}
"""Defaults of tasks whose predictions are too large to be dense."""

TASKS: dict[str, Task] = {
    "classification": Task(
        learner=f"{MODULES}.classification:Classifier",
        label="classification",
        metrics=("accuracy", "macro_f1", "mcc", "ece", "cross_entropy"),
        shown={"accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC", "ece": "ECE"},
        decides="accuracy",
        words="accuracy",
        larger_is_better=True,
        percent=True,
        row="proxy text",
        choices="classes",
        shares_steps=True,
        query_only=f"{MODULES}.query_only.learners:QueryOnlyClassifier",
        query_only_sources=("callable",),
        pipeline="text-classification",
        heads={"ForSequenceClassification": "AutoModelForSequenceClassification"},
    ),
    "causal_lm": Task(
        learner=f"{MODULES}.language_model:CausalLanguageModel",
        label="causal language modelling",
        metrics=("cross_entropy", "perplexity", "bits_per_byte"),
        shown={"bits_per_byte": "bits/byte", "perplexity": "perplexity", "cross_entropy": "nats/token"},
        decides="bits_per_byte",
        words="bits per byte",
        larger_is_better=False,
        percent=False,
        row="token",
        choices="tokens",
        labels="tokens",
        dense=False,
        new_head=False,
        generates=True,
        query_only=f"{MODULES}.query_only.learners:QueryOnlyLanguageModel",
        query_only_sources=("callable", "endpoint"),
        query_only_tokenizer=True,
        defaults=_COMPRESSED,
        pipeline="text-generation",
        heads={"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM"},
    ),
    "masked_lm": Task(
        learner=f"{MODULES}.masked_language_model:MaskedLanguageModel",
        label="masked language modelling",
        metrics=("cross_entropy", "perplexity", "accuracy"),
        shown={"cross_entropy": "nats/token", "perplexity": "perplexity", "accuracy": "accuracy"},
        decides="cross_entropy",
        words="nats per masked token",
        larger_is_better=False,
        percent=False,
        row="masked token",
        choices="tokens",
        labels="tokens",
        dense=False,
        new_head=False,
        fixed={
            "language.position_stride": "is for task = causal_lm; masked_lm has language.mask_probability",
            "language.alignment": "is for task = causal_lm; masked models share a tokenizer",
        },
        defaults=_COMPRESSED,
        pipeline="fill-mask",
        heads={"ForMaskedLM": "AutoModelForMaskedLM"},
    ),
    "question_answering": Task(
        learner=f"{MODULES}.question_answering:QuestionAnswering",
        label="question answering",
        metrics=("f1", "exact_match"),
        shown={"f1": "F1", "exact_match": "exact match"},
        decides="f1",
        words="F1",
        larger_is_better=True,
        percent=True,
        row="start or end",
        choices="characters",
        labels="answer",
        dense=False,
        frozen_cache=False,
        defaults=_COMPRESSED,
        pipeline="question-answering",
        heads={"ForQuestionAnswering": "AutoModelForQuestionAnswering"},
    ),
}
"""By the name in ``task``."""


def tasks_with(**fields: Any) -> str:
    """The tasks whose entries have these fields, for error messages.

    >>> tasks_with(dense=True), tasks_with(labels="tokens")
    ('classification', 'causal_lm or masked_lm')
    """
    chosen = [
        name for name, task in TASKS.items() if all(getattr(task, key) == fields[key] for key in fields)
    ]
    return " or ".join(chosen)


def imported(name: str) -> Any:
    """The class that ``module:Class`` names; its module is imported now."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def task_named(stored: str) -> Task:
    """The task of a stored result; before 0.1.0 question answering was called ``reading``."""
    return TASKS["question_answering" if stored == "reading" else stored]


def _known(name: str) -> str:
    if name in TASKS:
        return name
    near = get_close_matches(name, TASKS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TASKS)}"
    raise PydanticCustomError("unknown_name", "no such task; {hint}", {"hint": hint})


TaskName = Annotated[str, AfterValidator(_known)]
"""The name of an entry of ``TASKS``."""
