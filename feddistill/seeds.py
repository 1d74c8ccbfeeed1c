"""Random generators of a run, derived from one seed by name.

A step's seed depends on its name, never on the steps before it: so a resumed run, and the same client on
another engine, draw the same numbers.
"""

import hashlib

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """A seed below 2**31 for the purpose ``names``.

    >>> derive(0, "round", 1, "train") == derive(0, "round", 1, "train")
    True
    >>> derive(0, "round", 1, "train") == derive(0, "round", 2, "train")
    False
    """
    path = "/".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big") >> 33


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """NumPy's generator for the purpose ``names``."""
    return np.random.default_rng(derive(seed, *names))
