"""DistillKit's storage of a teacher's answers, reimplemented from its documentation and file format.

The ``exact`` likeliest log-probabilities are stored as bfloat16, the rest of the ``k`` as a least-squares
curve over their rank, ids packed in as few bits as the vocabulary needs.  Its documentation gives "about 114"
and "about 300" bytes per token for the two published settings.
https://github.com/arcee-ai/DistillKit, README, "Logit Compression".
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """``terms``: powers of the rank; 0.5 is the square root."""

    k: int
    exact: int
    terms: tuple[float, ...]


BUDGET = Settings(50, 1, (0, 1, 0.5))
RECOMMENDED = Settings(128, 16, (0, 1, 2, 3, 4, 0.5))


def stored_bytes(settings: Settings, vocabulary: int) -> int:
    """Bytes per token: bfloat16 values, float32 coefficients, packed ids."""
    bits = math.ceil(math.log2(vocabulary))
    return 2 * settings.exact + 4 * len(settings.terms) + math.ceil(settings.k * bits / 8)


def reconstruct(log_probs: Tensor, settings: Settings) -> Tensor:
    """Log-probabilities ``[N, V]`` as they are read back; missing mass is spread uniformly.

    More accurate than the original in two points: the curve is fitted and evaluated in float64 and only its
    coefficients are float32 (all in float32, rank**4 costs the recommended settings 0.05 to 0.1 nats); and
    rows are normalised, since the curve may add up to more than one and missing ids have at least 1e-8 each.
    """
    values, ids = log_probs.topk(settings.k, dim=-1)
    exact = values[:, : settings.exact].bfloat16().double()
    rank = torch.arange(settings.k - settings.exact, dtype=torch.float64)
    basis = torch.stack([rank**term for term in settings.terms], -1)
    coefficients = torch.linalg.lstsq(basis, values[:, settings.exact :].double().T).solution.float()
    kept = torch.cat([exact, (basis @ coefficients.double()).T], -1)
    missing = (1 - kept.exp().sum(-1, keepdim=True)) / (log_probs.shape[1] - settings.k)
    dense = missing.clamp(min=1e-8).log().repeat(1, log_probs.shape[1])
    return dense.scatter_(-1, ids, kept).log_softmax(-1).float()
