"""Checks of the settings that need the data and the models; done before anything is trained or written."""

from importlib.util import find_spec

from feddistill.aggregation.attacks import attackers
from feddistill.config import Config
from feddistill.config.methods import METHODS
from feddistill.config.tasks import TASKS
from feddistill.errors import ConfigError
from feddistill.tasks.choose import learner_class
from feddistill.tasks.query import query_of
from feddistill.types import Splits

DENSE_CLASSES = 256
"""Classes that the codec ``dense`` can hold; for more, ``topk`` is smaller."""


def check(config: Config, splits: Splits, *, build: bool = True) -> None:
    """Check the settings against the data, and with ``build`` against every model, which is built once.

    Raises:
        ConfigError: A setting needs more clients, classes or labels than there are.
        ModelError: A model cannot be loaded, cut, or made to read its own tokenizer's texts.
    """
    query = query_of(config, splits)
    classes, clients = query.vocab_size, len(splits.private)
    config.aggregation.check(min(config.clients.per_round or clients, clients))
    attackers(config.simulate.attack, [private.name for private in splits.private])
    for attack in config.simulate.attack:
        attack.check(classes)
    _check_payload(config, classes)
    _check_baselines(config, splits)
    learner_class(config.task).check_data(config, splits)
    if not build:
        return
    count = max(splits.places) + 1
    several = {f"clients.models.{i}": model for i, model in enumerate(config.clients.models[:count])}
    for name, model in {**several, "student.model": config.student.model}.items():
        kind = learner_class(config.task, query_only=model.query_only)
        kind.check_model(config, splits, model, name, query)


def _check_payload(config: Config, classes: int) -> None:
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


def _check_baselines(config: Config, splits: Splits) -> None:
    has_labels = TASKS[config.task].labels == "tokens" or splits.proxy.known.any()
    for name in config.baselines:
        method = METHODS[name]
        if method.package is not None and find_spec(method.package) is None:
            raise ConfigError(
                f"baselines: {name} needs the package {method.package}: "
                f"pip install 'feddistill[{method.extra}]'"
            )
        if method.needs_labels and not has_labels:
            raise ConfigError(f"baselines: {name} needs labels, but data.proxy.labelled is 0")
