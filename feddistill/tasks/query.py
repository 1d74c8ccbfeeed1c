"""What is predicted of the proxy texts: the rows of an upload and the labels that the server knows."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feddistill.config import Config
from feddistill.config.tasks import TASKS, imported
from feddistill.modelio.packing import PackedTexts
from feddistill.models.causal import TextReader
from feddistill.types import Splits, TextSet


@dataclass(frozen=True, slots=True)
class ProxyQuery:
    """``N`` rows over ``V`` classes or tokens."""

    positions: int
    """``N``."""
    vocab_size: int
    """``V``."""
    fingerprint: str
    """Hash of the classes, or of the student's tokenizer."""
    labels: Tensor
    """``[N]`` true ids; negative if unknown."""
    domains: Tensor | None
    """``[N]``, small integers: the origin of each row; ``None`` if unknown."""
    reader: TextReader | None = None
    """For language models: the student's."""
    blocks: PackedTexts | None = None
    """For language models: the proxy texts as the student reads them."""
    rows: Tensor | None = None
    """For language models: ``[N]``, the rows of ``blocks`` to predict."""
    compressed: bool = False
    """True if dense predictions would be too large."""


class _Learner(Protocol):
    """The part of a task's learner that is needed here; the learner itself needs this module."""

    def query(self, config: Config, splits: Splits) -> ProxyQuery: ...


def query_of(config: Config, splits: Splits) -> ProxyQuery:
    """The query of a run."""
    learner: _Learner = imported(TASKS[config.task].learner)
    return learner.query(config, splits)


def domains_of(proxy: TextSet) -> Tensor | None:
    """``[N]``, the origin of each text as a small integer; ``None`` if it is unknown."""
    if proxy.sources is None:
        return None
    names = {name: index for index, name in enumerate(sorted(set(proxy.sources)))}
    return torch.tensor([names[name] for name in proxy.sources])
