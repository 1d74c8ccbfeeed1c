"""Load a trained model for evaluation or release: a run's student or a ``save_pretrained`` folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    utils,
)

from feddistill import models
from feddistill.config import Config
from feddistill.config.models import ScratchModel, TrainedTokenizer
from feddistill.config.tasks import TASKS
from feddistill.errors import ModelError, RunError
from feddistill.models.causal import Causal
from feddistill.models.tokenizers import TextBounds, begin_texts, text_bounds
from feddistill.runs import experiment
from feddistill.seeds import derive
from feddistill.store import layout
from feddistill.store.layout import CONFIG, RESULT
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.choose import learner_class
from feddistill.tasks.learner import BuiltModel

MODULES = "modules.json"
DENSE = "2_Dense"
"""Folder of the head of an exported mean-pool classifier."""
SLACK = 8
"""Rows by which a table of positions may differ from the length that is read."""
LONGEST = 1024
"""Maximum length in tokens if neither the model nor the tokenizer specifies one."""


@dataclass(frozen=True, slots=True)
class Student:
    """A trained model in evaluation mode."""

    name: str
    """Name in results and error messages."""
    task: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    """Maximum text length in training, in tokens."""
    labels: tuple[str, ...] = ()
    """Classification only: the classes in the order of the outputs."""
    bf16: bool = False
    """True if forward passes run in bfloat16."""
    batch_size: int = 32
    """Texts per forward pass."""
    trained_bounds: TextBounds | None = None
    """Language models only: the tokens around texts in training; ``None`` if that is not known."""
    pairs: bool = False
    """True for the student of a run whose texts are pairs (``pair_column``)."""

    @property
    def bounds(self) -> TextBounds:
        """Language models only: the tokens around texts; if unknown, those that the tokenizer adds."""
        return self.trained_bounds or text_bounds(self.tokenizer, "auto", self.name)

    @property
    def specialist(self) -> models.Specialist:
        """The model and tokenizer as a ``Specialist``."""
        return models.Specialist(self.model, self.tokenizer, self.max_tokens)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device


def load(path: Path) -> Student:
    """Load the student of a run, or the model of a ``save_pretrained`` folder.

    Raises:
        RunError: ``path`` is neither a run nor a model, or the run is incomplete or has no weights left.
        ModelError: The model cannot be loaded, or its architecture is not supported.
    """
    if (path / CONFIG).is_file():
        return of_run(path)
    if (path / "config.json").is_file():
        return of_folder(path)
    raise RunError(f"{path} is not a run: it has no {CONFIG}, nor is it a model: it has no config.json")


def of_run(out: Path) -> Student:
    """Load the student of a complete run, from the round with the best validation metric.

    The data are read only if the tokenizer was trained on the proxy texts; it is then trained again.
    """
    config = experiment.stored_config(out)
    directory = RunDirectory.open(out)
    try:
        if not directory.path(RESULT).exists():
            raise RunError(f"{out} is not complete; go on with: feddistill train --resume --out {out}")
        experiment.keeps_student(config, out)
        _quiet()
        experiment.prepare(config)
        weights = directory.read_json(RESULT)["student_weights"]
        labels: tuple[str, ...] = ()
        if TASKS[config.task].labels == "class":
            labels = tuple(directory.read_json(layout.SKEW)["labels"])
        built = _built(config, labels, _public(config, directory))
        directory.done(layout.step_of(weights))  # verifies the weights file
        models.restore(built.model, directory.path(weights))
    finally:
        directory.close()
    bounds = built.reader.bounds if isinstance(built, Causal) else None
    if bounds is not None:
        begin_texts(built.tokenizer, bounds)
        if config.language.chat_template is not None:
            built.tokenizer.chat_template = config.language.chat_template
    return Student(
        name=str(out),
        task=config.task,
        model=_ready(built.model),
        tokenizer=built.tokenizer,
        max_tokens=built.max_tokens,
        labels=labels,
        bf16=config.precision == "bf16",
        batch_size=config.clients.eval_batch_size,
        trained_bounds=bounds,
        pairs=_pairs(config),
    )


def _pairs(config: Config) -> bool:
    """True if the texts are pairs; then those of every set are, and there is a test set."""
    source = config.data.test.source or config.data.source
    return TASKS[config.task].labels == "class" and getattr(source, "pair_column", None) is not None


def _built(config: Config, labels: tuple[str, ...], public: tuple[str, ...]) -> BuiltModel:
    """Build the student with its initial weights."""
    name = "student.model"
    seed = derive(config.seed, "init", name)
    return learner_class(config.task).build(config, config.student.model, name, seed, public, labels)


def _public(config: Config, directory: RunDirectory) -> tuple[str, ...]:
    """The proxy texts, if the student's tokenizer was trained on them."""
    source: object = config.student.model.source
    while isinstance(source, ScratchModel):
        source = source.tokenizer
    if not isinstance(source, TrainedTokenizer):
        return ()
    return experiment.stored_splits(config, directory).proxy.texts


def of_folder(path: Path) -> Student:
    """Load a model saved by transformers, or a mean-pool classifier written by ``export``."""
    _quiet()
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if (path / MODULES).is_file():
            model, task = _mean_pool(path, config), "classification"
        else:
            task, auto = _head(path, config)
            model = auto.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load a model from {path}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    classes = range(config.num_labels) if TASKS[task].labels == "class" else ()
    labels = tuple(config.id2label[i] for i in classes)
    longest = _longest(model, config, tokenizer, str(path))  # before the model moves to a GPU
    return Student(str(path), task, _ready(model), tokenizer, longest, labels)


def _head(path: Path, config: PretrainedConfig) -> tuple[str, Any]:
    """The task of the model, and the class of transformers that loads it."""
    names = config.architectures or []
    for task, entry in TASKS.items():
        for ending, auto in entry.heads.items():
            if any(name.endswith(ending) for name in names):
                return task, getattr(transformers, auto)
    known = [entry.label for entry in TASKS.values() if entry.heads]
    raise ModelError(
        f"{path} holds {', '.join(names) or 'an unnamed architecture'}; supported are models for "
        f"{', '.join(known[:-1])} and {known[-1]}"
    )


def _mean_pool(path: Path, config: PretrainedConfig) -> models.MeanPoolClassifier:
    """Load encoder and head of an exported mean-pool classifier, in the sentence-transformers layout."""
    settings = path / DENSE / "config.json"
    if (
        not settings.is_file()
        or not json.loads(settings.read_text()).get("out_features") == config.num_labels
    ):
        raise ModelError(f"{path} is a sentence encoder without a classifier in {DENSE}")
    model = models.MeanPoolClassifier(
        AutoModel.from_pretrained(path, dtype=torch.float32), config.hidden_size, config.num_labels
    )
    head = load_file(path / DENSE / "model.safetensors")
    model.head.load_state_dict({key.removeprefix("linear."): value for key, value in head.items()})
    return model


def _longest(
    model: nn.Module, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str
) -> int:
    """The length that the model reads. A table of positions is tried: RoBERTa's has more rows than the
    longest text has tokens, and a tokenizer need not know its model's length.

    Raises:
        ModelError: It reads no text at all.
    """
    positions = getattr(config, "max_position_embeddings", None)
    known = [tokenizer.model_max_length, positions]
    length = min([int(one) for one in known if one is not None and one < 1_000_000] or [LONGEST])
    if positions is None or not _has_table(model, int(positions)) or _reads(model, tokenizer, length):
        return length
    if not _reads(model, tokenizer, 1):
        raise ModelError(f"{name} reads no text, not even of one token")
    read, too_long = 1, length
    while too_long - read > 1:
        middle = (read + too_long) // 2
        read, too_long = (middle, too_long) if _reads(model, tokenizer, middle) else (read, middle)
    return read


def _reads(model: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int) -> bool:
    try:
        models.read(model, tokenizer, length)
    except (IndexError, RuntimeError):
        return False
    return True


def _has_table(model: nn.Module, positions: int) -> bool:
    """True if the model looks positions up in a table of about that length."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return any(positions <= table.num_embeddings <= positions + SLACK for table in tables)


def _ready(model: nn.Module) -> nn.Module:
    if torch.cuda.is_available():
        model.cuda()
    return model.eval()


def _quiet() -> None:
    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
