"""Texts: sources, splits, partition among clients, label skew."""

from feddistill.data.skew import Skew, skew
from feddistill.data.splits import labelled, lines, load

__all__ = ["Skew", "labelled", "lines", "load", "skew"]
