"""Classes of a trained classifier: its head's rows are taken by the names of the classes."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from feddistill.config.models import HubModel, ModelSource, PackageModel
from feddistill.errors import ModelError
from feddistill.models.pretrained import FAILURES, adapter_base
from feddistill.models.sources import gguf_of, location


def class_names(source: ModelSource, name: str) -> tuple[str, ...]:
    """The classes of a trained classifier in the order of its head; empty if it has no head or no names."""
    if not isinstance(source, HubModel | PackageModel):
        return ()
    base = adapter_base(source, name)
    revision = getattr(source, "revision", None) or "main"
    where, more = (base, {}) if base else (location(source, name), {"revision": revision, **gguf_of(source)})
    try:
        config = AutoConfig.from_pretrained(where, **more)
    except FAILURES:  # the error comes when the model is loaded
        return ()
    if not any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ()):
        return ()
    names = {int(row): str(label) for row, label in config.id2label.items()}
    if all(map(_is_default, names.values())):
        names = {int(row): str(label) for label, row in config.label2id.items()}
    if all(map(_is_default, names.values())) or sorted(names) != list(range(len(names))):
        return ()
    return tuple(names[row] for row in range(len(names)))


def _is_default(label: str) -> bool:
    return re.fullmatch(r"LABEL_\d+", label) is not None


def order_head(model: Any, known: Sequence[str], labels: Sequence[str], name: str) -> None:
    """Keep the rows of the head that are ``labels``, in that order.

    Args:
        model: One of transformers' classifiers.
        known: The classes of its head.
        labels: The classes of the run; some of ``known``, upper and lower case aside.
        name: The model's setting, for errors.

    Raises:
        ModelError: A class of the run is not one of the head's.
    """
    exact = {label: row for row, label in enumerate(known)}
    folded = {label.casefold(): row for row, label in enumerate(known)}
    if len(exact) < len(known):
        raise ModelError(f"{name}: its head has a class twice in id2label: {', '.join(known)}")
    rows = [exact.get(label, folded.get(label.casefold(), -1)) for label in labels]
    if -1 in rows or len(set(rows)) < len(rows):
        raise ModelError(
            f"{name}: its head has the classes {', '.join(known)}, the data have {', '.join(labels)}; name "
            "them alike in the data or in the model's id2label, or take head: mean_pool, a new one"
        )
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(known)]
    if not linear:
        raise ModelError(f"{name}: found no linear head of {len(known)} rows in {type(model).__name__}")
    head = linear[-1]
    with torch.no_grad():
        head.weight = nn.Parameter(head.weight[rows].clone())
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias[rows].clone())
    head.out_features = len(rows)
    config = model.config
    config.id2label = dict(enumerate(labels))  # sets num_labels
    config.label2id = {label: row for row, label in enumerate(labels)}
    if hasattr(model, "num_labels"):
        model.num_labels = len(rows)
