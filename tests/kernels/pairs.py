"""Combinations of settings in which every two meet: a fault that needs three at once is rare."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairwise(*of: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Few tuples, one value of each axis, that have every pair of values of any two axes."""
    axes = [list(axis) for axis in of]
    left = {
        ((i, x), (j, y))
        for i, j in combinations(range(len(axes)), 2)
        for x, y in product(range(len(axes[i])), range(len(axes[j])))
    }
    every = [tuple(enumerate(places)) for places in product(*(range(len(axis)) for axis in axes))]
    found = []
    while left:
        best = max(every, key=lambda one: len(left.intersection(combinations(one, 2))))
        left.difference_update(combinations(best, 2))
        found.append(tuple(axes[i][place] for i, place in best))
    return found
