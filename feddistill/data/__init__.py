"""Texts: sources, splits, partition among clients, label skew."""

from feddistill.data.skew import Skew, skew
from feddistill.data.sources import describe
from feddistill.data.splits import check_pairs, labelled, lines, load

__all__ = ["Skew", "check_pairs", "describe", "labelled", "lines", "load", "skew"]
