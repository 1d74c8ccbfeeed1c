"""Pad token ids of different lengths to one tensor."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = Sequence[int] | NDArray[np.int64]
"""Token ids of one input of a model; ``TYPE`` is added to those of token type 1."""

TYPE = 1 << 32
"""Above all ids of tokens. Equal ids of different types are different inputs, also as keys of a cache."""

PAD_TO = 4
"""Batches are padded to a multiple of this: few shapes, aligned rows."""


def padded(length: int) -> int:
    """The padded length of a batch whose longest text has ``length`` tokens."""
    return -(-length // PAD_TO) * PAD_TO


def pad(tokens: Sequence[Tokens], pad_id: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids (with their types) and mask, ``[B, L]`` each; ``L`` is a multiple of ``PAD_TO`` unless
    ``exact``."""
    longest = max(map(len, tokens))
    length = longest if exact else padded(longest)
    ids = torch.full((len(tokens), length), pad_id, dtype=torch.long)
    mask = torch.zeros(len(tokens), length, dtype=torch.long)
    for i, text in enumerate(tokens):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
    return ids, mask


def inputs(ids: Tensor) -> dict[str, Tensor]:
    """The arguments of a model that reads ``ids``: ``token_type_ids`` only if some are not 0.

    >>> inputs(torch.tensor([[7, 8 + TYPE]]))
    {'input_ids': tensor([[7, 8]]), 'token_type_ids': tensor([[0, 1]])}
    """
    types = ids // TYPE
    return {"input_ids": ids % TYPE, "token_type_ids": types} if bool(types.any()) else {"input_ids": ids}
