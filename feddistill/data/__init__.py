"""Texts: sources, splits, partition among clients, label skew."""

from feddistill.data.skew import Skew, skew
from feddistill.data.sources import describe
from feddistill.data.splits import labelled, lines, load

__all__ = ["Skew", "describe", "labelled", "lines", "load", "skew"]
