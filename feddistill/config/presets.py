"""Benchmarks of the Hugging Face hub: location, columns, prompts and metric of each.

Prompts are those of lm-evaluation-harness (Gao et al., 2023) if it has the benchmark, so that results are
comparable; ``wic`` names the word as the data set does, not as it is inflected in the first sentence.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter
from typing import Literal

from feddistill.errors import ConfigError

Kind = Literal["classification", "choice", "question_answering", "language", "summary"]


@dataclass(frozen=True, slots=True)
class Preset:
    """One benchmark."""

    name: str
    kind: Kind
    """``choice``: select the continuation of a text; ``language``: plain text; ``question_answering``:
    questions on a passage."""
    hub: str
    """Name of the data set on the hub."""
    subset: str | None
    splits: tuple[str, ...]
    measured: str
    """The split to evaluate on: the test split, or ``validation`` if the test labels are hidden."""
    licence: str
    """As in the data set's card."""
    hidden: tuple[str, ...] = ()
    """Splits without labels (-1 in the files), which can only be a proxy set."""
    text: str = "{text}"
    """Template of a classifier's input. In pairs, the part that may be cut comes last."""
    label_column: str = "label"
    labels: tuple[str, ...] = ()
    """In the order of the numbers in the files."""
    metric: str = "accuracy"
    """The metric that the benchmark ranks by."""
    positive: str | None = None
    """The positive class of ``metric = f1``."""
    prompt: str = ""
    """Template of a causal model's input."""
    answers: tuple[str, ...] = ()
    """The continuation that stands for each of ``labels``."""
    cut: str | None = None
    """The column that is cut if a prompt is longer than the model reads."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in the templates.

        >>> find("glue/rte").columns
        ('sentence1', 'sentence2')
        """
        fields = [field for _, field, _, _ in Formatter().parse(self.text + self.prompt) if field]
        return tuple(dict.fromkeys(fields))

    @property
    def note(self) -> str | None:
        """A remark on the results; ``None`` for most benchmarks."""
        if not self.hidden:
            return None
        return f"the test labels of {self.name} are hidden: {self.measured} is the test"


_TEST = ("train", "validation", "test")
_SAME = "not_entailment"


def _glue(
    task: str,
    text: str,
    labels: tuple[str, ...],
    prompt: str,
    answers: tuple[str, ...],
    metric: str = "accuracy",
    positive: str | None = None,
    name: str | None = None,
) -> Preset:
    mnli = task == "mnli"
    kinds = ("matched", "mismatched")
    hidden = tuple(f"test_{kind}" for kind in kinds) if mnli else ("test",)
    measured = "validation"
    if mnli:
        measured = "validation_mismatched" if name else "validation_matched"
    return Preset(
        name=name or f"glue/{task}",
        kind="classification",
        hub="nyu-mll/glue",
        subset=task,
        splits=("train", *(f"validation_{kind}" for kind in kinds), *hidden) if mnli else _TEST,
        measured=measured,
        licence="other",
        hidden=hidden,
        text=text,
        labels=labels,
        metric=metric,
        positive=positive,
        prompt=prompt,
        answers=answers,
    )


def _superglue(
    task: str,
    text: str,
    labels: tuple[str, ...],
    prompt: str,
    answers: tuple[str, ...],
    kind: Kind = "classification",
    metric: str = "accuracy",
    cut: str | None = None,
) -> Preset:
    return Preset(
        name=f"superglue/{task}",
        kind=kind,
        hub="aps/super_glue",
        subset=task,
        splits=_TEST,
        measured="validation",
        licence="other",
        hidden=("test",),
        text=text,
        labels=labels,
        metric=metric,
        prompt=prompt,
        answers=answers,
        cut=cut,
    )


def _wikitext(size: int) -> Preset:
    return Preset(
        name=f"wikitext-{size}",
        kind="language",
        hub="Salesforce/wikitext",
        subset=f"wikitext-{size}-raw-v1",
        splits=_TEST,
        measured="test",
        licence="cc-by-sa-3.0",
        metric="bits_per_byte",
    )


def _squad(version: int) -> Preset:
    ask = "Question: {question}\n\nAnswer:"
    if version == 2:
        ask = "Question: {question} (or say unanswerable)\n\nAnswer:"
    return Preset(
        name="squad" if version == 1 else "squad_v2",
        kind="question_answering",
        hub="rajpurkar/squad" if version == 1 else "rajpurkar/squad_v2",
        subset="plain_text" if version == 1 else "squad_v2",
        splits=("train", "validation"),
        measured="validation",
        licence="cc-by-sa-4.0",
        text="{question}{context}",
        label_column="answers",
        metric="f1",
        prompt="Title: {title}\n\nBackground: {context}\n\n" + ask,
        cut="context",
    )


_MNLI = (
    "mnli",
    "premise: {premise}\nhypothesis: {hypothesis}",
    ("entailment", "neutral", "contradiction"),
    "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
    ("True", "Neither", "False"),
)

_ALL = (
    _glue(
        "sst2",
        "{sentence}",
        ("negative", "positive"),
        "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
    ),
    _glue(*_MNLI),
    _glue(*_MNLI, name="glue/mnli_mismatched"),
    _glue(
        "qnli",
        "question: {question}\nsentence: {sentence}",
        ("entailment", _SAME),
        "{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:",
        ("yes", "no"),
    ),
    _glue(
        "rte",
        "sentence1: {sentence1}\nsentence2: {sentence2}",
        ("entailment", _SAME),
        "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        ("True", "False"),
    ),
    _glue(
        "wnli",
        "sentence1: {sentence1}\nsentence2: {sentence2}",
        (_SAME, "entailment"),
        "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        ("False", "True"),
    ),
    _glue(
        "mrpc",
        "sentence1: {sentence1}\nsentence2: {sentence2}",
        ("not_equivalent", "equivalent"),
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Question: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
        metric="f1",
        positive="equivalent",
    ),
    _glue(
        "qqp",
        "question1: {question1}\nquestion2: {question2}",
        ("not_duplicate", "duplicate"),
        "Question 1: {question1}\nQuestion 2: {question2}\n"
        "Question: Do both questions ask the same thing?\nAnswer:",
        ("no", "yes"),
        metric="f1",
        positive="duplicate",
    ),
    _glue(
        "cola",
        "{sentence}",
        ("unacceptable", "acceptable"),
        "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
        ("no", "yes"),
        metric="mcc",
    ),
    _superglue(
        "boolq",
        "question: {question}\npassage: {passage}",
        ("False", "True"),
        "{passage}\nQuestion: {question}?\nAnswer:",
        ("no", "yes"),
        cut="passage",
    ),
    _superglue(
        "cb",
        "hypothesis: {hypothesis}\npremise: {premise}",
        ("entailment", "contradiction", "neutral"),
        "{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:",
        ("True", "False", "Neither"),
        metric="macro_f1",
    ),
    _superglue(
        "rte",
        "hypothesis: {hypothesis}\npremise: {premise}",
        ("entailment", _SAME),
        "{premise}\nQuestion: {hypothesis} True or False?\nAnswer:",
        ("True", "False"),
    ),
    _superglue(
        "wic",
        "word: {word}\nsentence1: {sentence1}\nsentence2: {sentence2}",
        ("False", "True"),
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Question: Is the word '{word}' used in the same way in the two sentences above?\nAnswer:",
        ("no", "yes"),
    ),
    _superglue(
        "copa",
        "{premise}{question}{choice1}{choice2}",
        ("choice1", "choice2"),
        "",
        (),
        kind="choice",
    ),
    Preset(
        name="ag_news",
        kind="classification",
        hub="fancyzhx/ag_news",
        subset=None,
        splits=("train", "test"),
        measured="test",
        licence="unknown",
        labels=("World", "Sports", "Business", "Sci/Tech"),
        prompt="{text}\nQuestion: Is this about world affairs, sports, business or technology?\nAnswer:",
        answers=("world affairs", "sports", "business", "technology"),
    ),
    _squad(1),
    _squad(2),
    _wikitext(2),
    _wikitext(103),
    Preset(
        name="cnn_dailymail",
        kind="summary",
        hub="abisee/cnn_dailymail",
        subset="3.0.0",
        splits=_TEST,
        measured="test",
        licence="apache-2.0",
        text="{article}",
        label_column="highlights",
        metric="rougeL",
        prompt="{article}\n\nTL;DR:",  # Radford et al., 2019, section 3.6
        cut="article",
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
"""Benchmark by name."""

REFUSED = {
    "glue/stsb": "is a regression (similarity from 0 to 5), and students classify",
    "glue/ax": "has no labels outside its server",
    "superglue/multirc": "ranks sets of answers to a question, which is not supported",
    "superglue/record": "asks for entities of a passage, which is not supported",
    "superglue/wsc": "asks for words in a sentence by their positions, which is not supported",
}
"""Benchmarks that are not supported, with the reason."""


def find(name: str) -> Preset:
    """The benchmark ``name``.

    Raises:
        ConfigError: It does not exist or is not supported; the message says why, or names the nearest.

    >>> find("glue/sst3")
    Traceback (most recent call last):
    feddistill.errors.ConfigError: 'glue/sst3' is not a benchmark; did you mean 'glue/sst2'?
    """
    if name in PRESETS:
        return PRESETS[name]
    if name in REFUSED:
        raise ConfigError(f"{name} {REFUSED[name]}")
    near = get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}"
    raise ConfigError(f"{name!r} is not a benchmark; {hint}")
