"""What only the data and the models themselves can tell, before anything is trained or written."""

from importlib.util import find_spec

from feddistill import models
from feddistill.aggregation.attacks import attackers
from feddistill.alignment import Vocabulary, check_alignable
from feddistill.config import Config
from feddistill.config.models import ModelConfig
from feddistill.config.tasks import LANGUAGE
from feddistill.errors import ConfigError, ModelError
from feddistill.models import adapters, causal, reading
from feddistill.models.tokenizers import fingerprint
from feddistill.tasks import black_box
from feddistill.tasks.query import query_of
from feddistill.types import Splits

DENSE_CLASSES = 256
"""The most that the dense codec holds: where there are more, ``topk`` is smaller."""


def check(config: Config, splits: Splits, *, build: bool = True) -> None:
    """Hold the settings against the data, and ``build`` every model once.

    Raises:
        ConfigError: A setting asks for more clients, classes or labels than there are.
        ModelError: A model cannot be had, cut, or made to read its own tokenizer's texts.
    """
    question = query_of(config, splits)
    classes, clients = question.vocab_size, len(splits.private)
    config.aggregation.check(min(config.clients.per_round or clients, clients))
    attackers(config.simulate.attack, [private.name for private in splits.private])
    for attack in config.simulate.attack:
        attack.check(classes)
    if config.payload.codec == "dense" and classes > DENSE_CLASSES:
        raise ConfigError(
            f"payload.codec = 'dense' holds up to {DENSE_CLASSES} classes, "
            f"the data have {classes}; use 'topk'"
        )
    if config.payload.codec in ("topk", "threshold") and config.payload.k > classes:
        raise ConfigError(f"payload.k = {config.payload.k}, but there are only {classes} classes")
    if config.payload.compression == "zstd" and find_spec("zstandard") is None:
        raise ConfigError(
            "payload.compression = 'zstd' needs the package zstandard: pip install 'feddistill[protocol]'"
        )
    if "fedlora" in config.baselines and find_spec("peft") is None:
        raise ConfigError("baselines: fedlora needs the package peft: pip install 'feddistill[lora]'")
    labelled = config.task in LANGUAGE or splits.proxy.known.any()
    if "fedmkt" in config.baselines and not labelled:
        raise ConfigError("baselines: fedmkt needs labels, but data.proxy.labelled is 0")
    if "public_only" in config.baselines and not labelled:
        raise ConfigError("baselines: public_only needs labels, but data.proxy.labelled is 0")
    if config.task == "question_answering" and not config.question_answering.allow_no_answer:
        _answered(splits)
    if not build:
        return
    several = {
        f"clients.models.{index}": model
        for index, model in enumerate(config.clients.models[: max(splits.places) + 1])
    }
    for name, model in {**several, "student.model": config.student.model}.items():
        if model.black_box:
            asked = black_box.tried(model, name, splits.proxy, classes, config.task)
            if asked is not None:
                _speaks(config, asked, question.fingerprint, name)
        elif config.task in LANGUAGE:
            built = _built(model, name, splits, masked=config.task == "masked_lm")
            _speaks(config, built, question.fingerprint, name)
            adapters.adapt(built.model, model, name, head=False)
        elif config.task == "question_answering":
            reader = reading.build(model, config.question_answering, 0, name, splits.proxy.texts)
            learns = (
                private
                for place, private in zip(splits.places, splits.private, strict=True)
                if name == f"clients.models.{place % len(config.clients.models)}"
            )
            for texts in (splits.proxy, splits.validation, splits.test, *learns):
                reader.pages(texts)
            adapters.adapt(reader.model, model, name, head=True)
        else:
            made = models.build(model, classes, 0, name, splits.proxy.texts)
            adapters.adapt(made.model, model, name, head=True)


def _answered(splits: Splits) -> None:
    """Whether every question has an answer, of those whose answers are known."""
    for texts in (*splits.private, splits.proxy, splits.validation, splits.test):
        for row, right in enumerate(texts.answers or ()):
            if right == ():
                raise ConfigError(
                    f"{texts.name}: {texts.ids[row]} has no answer, which "
                    "question_answering.allow_no_answer: true allows"
                )


def _built(model: ModelConfig, name: str, splits: Splits, *, masked: bool) -> causal.Causal:
    client, student = ("causal", "masked") if masked else ("masked", "causal")
    try:
        return causal.build(model, 0, name, splits.proxy.texts, masked=masked)
    except (causal.LooksAheadError, causal.LooksBackError):
        if name != "student.model":
            check_alignable(client, student, False, name)
        raise


def _speaks(config: Config, built: causal.Causal, wanted: str, name: str) -> None:
    """Whether a language model can answer about the student's tokens."""
    length = config.student.model.max_tokens
    if fingerprint(built.reader.tokenizer) != wanted:
        if config.task == "masked_lm":
            check_alignable("masked", "masked", False, name)
        if config.payload.codec == "sampled":
            raise ConfigError(
                "payload.codec = 'sampled' cannot say that a row has no opinion, but the tokenizer of "
                f"{name} is not the student's; use 'topk' or 'threshold'"
            )
        Vocabulary(built.reader.tokenizer, f"{name}: its tokenizer")
        return
    if built.max_tokens < length:
        raise ModelError(
            f"{name}.max_tokens = {built.max_tokens}, but the student's blocks have {length} tokens"
        )
