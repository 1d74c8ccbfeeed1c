"""What the proxy texts ask: the rows of an answer, what they are over, and what the server knows of them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddistill import payload
from feddistill.config import Config
from feddistill.modelio.packing import PackedTexts
from feddistill.models.causal import TextReader
from feddistill.models.tokenizers import fingerprint, tokenizer_of
from feddistill.seeds import generator
from feddistill.training.spans import ids_of
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
    """``[N]``, true ids; negative where not known."""
    domains: Tensor | None
    """``[N]``, small integers: where each row is from."""
    reader: TextReader | None = None
    """Of a language model: the student's."""
    blocks: PackedTexts | None = None
    """Of a language model: the proxy texts as the student reads them."""
    rows: Tensor | None = None
    """``[N]``, which rows of ``blocks`` are asked."""
    compressed: bool = False
    """Whether a dense answer would be too large."""


def query_of(config: Config, splits: Splits) -> ProxyQuery:
    """Of a run."""
    proxy = splits.proxy
    if config.task == "classification":
        names = splits.label_names
        labels = torch.from_numpy(proxy.labels)
        return ProxyQuery(len(proxy), len(names), payload.fingerprint(names), labels, _domains(proxy))
    if config.task == "question_answering":
        return _of_passages(proxy)
    model, settings = config.student.model, config.language
    tokenizer = tokenizer_of(model.source, "student.model", proxy.texts)
    reader = TextReader(tokenizer, settings.completion_only)
    blocks = reader.blocks(proxy, model.max_tokens)
    if config.task == "masked_lm":
        rows = masked_rows(config, blocks, proxy.name)
    else:
        rows = np.flatnonzero(blocks.wanted)[settings.position_stride - 1 :: settings.position_stride]
    where = _domains(proxy)
    return ProxyQuery(
        positions=len(rows),
        vocab_size=reader.vocab_size,
        fingerprint=fingerprint(tokenizer),
        labels=torch.from_numpy(blocks.targets[rows]),
        domains=None if where is None else where[torch.from_numpy(blocks.texts[rows + 1])],
        reader=reader,
        blocks=blocks,
        rows=torch.from_numpy(rows),
        compressed=True,
    )


def _of_passages(proxy: TextSet) -> ProxyQuery:
    """Two rows a text, where its answer begins and where it ends: a character of the passage, or none."""
    longest = max(len(proxy.question(row)[1]) for row in range(len(proxy)))
    known = proxy.answers or (None,) * len(proxy)
    where = _domains(proxy)
    return ProxyQuery(
        positions=2 * len(proxy),
        vocab_size=longest + 1,
        fingerprint=payload.fingerprint(["no answer", f"{longest} characters of a passage"]),
        labels=torch.tensor([ids_of(right) for right in known]).flatten(),
        domains=None if where is None else where.repeat_interleave(2),
        compressed=True,
    )


def masked_rows(config: Config, blocks: PackedTexts, name: str) -> NDArray[np.int64]:
    """Rows whose tokens are hidden when a masked model answers, or is judged, about the set ``name``: a
    random share of the wanted ones, the same for everybody."""
    wanted = np.flatnonzero(blocks.wanted)
    count = max(1, round(config.language.mask_probability * len(wanted)))
    drawn = generator(config.seed, "hidden", name).permutation(len(wanted))[:count]
    return wanted[np.sort(drawn)]


def _domains(proxy: TextSet) -> Tensor | None:
    """Where each text is from, as small integers; ``None`` where that is not known."""
    if proxy.sources is None:
        return None
    names = {name: index for index, name in enumerate(sorted(set(proxy.sources)))}
    return torch.tensor([names[name] for name in proxy.sources])
