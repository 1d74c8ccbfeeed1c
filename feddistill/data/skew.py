"""Statistics of how much the clients' data differ."""

from dataclasses import dataclass

import numpy as np

from feddistill.types import Splits


@dataclass(frozen=True, slots=True)
class Skew:
    """Label histograms of the clients, and how non-IID they are."""

    clients: tuple[str, ...]
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """``[C][V]`` private examples by client and label."""
    proxy_counts: tuple[int, ...]
    """Labelled proxy texts by label."""
    non_iid: float | None
    """Mean total-variation distance of a client's label distribution from the pool's, weighted by size: 0 is
    IID; near 1, clients share no label. ``None`` for remote clients and texts without labels."""
    size_ratio: float | None
    """Size of the largest client over that of the smallest."""
    proxy_examples: int
    test_examples: int
    validation_examples: int
    test_also_public: int
    """Test texts that are also in the proxy set or a private set (contamination)."""
    examples: tuple[int, ...] = ()
    """Private texts by client, labelled or not; 0 for remote clients."""


def skew(splits: Splits) -> Skew:
    """Compute the statistics of ``splits``."""
    counts = np.stack([client.label_counts() for client in splits.private])  # [C, V]
    examples, sizes = [len(client) for client in splits.private], counts.sum(1)
    known = sizes.sum() > 0
    if known:
        pooled = counts.sum(0) / sizes.sum()
        distances = 0.5 * np.abs(counts / sizes[:, None] - pooled).sum(1)
    seen = set(splits.proxy.texts).union(*(client.texts for client in splits.private))
    return Skew(
        clients=tuple(client.name for client in splits.private),
        labels=splits.label_names,
        counts=tuple(tuple(int(n) for n in row) for row in counts),
        proxy_counts=tuple(int(n) for n in splits.proxy.label_counts()),
        non_iid=float((distances * sizes).sum() / sizes.sum()) if known else None,
        size_ratio=max(examples) / min(examples) if min(examples) else None,
        proxy_examples=len(splits.proxy),
        test_examples=len(splits.test),
        validation_examples=len(splits.validation),
        test_also_public=sum(text in seen for text in splits.test.texts),
        examples=tuple(examples),
    )
