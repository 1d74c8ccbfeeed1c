"""Aggregation rules: how the server combines the clients' answers to the same public texts.

A rule is a frozen value. Its fields are its settings, in a YAML file or on the command line; ``combine``
is its formula. Importing this package does not import torch.

Shapes: ``C`` clients, ``n`` rows of ``N``, ``V`` classes or vocabulary, ``W`` columns of a block.
"""

from feddistill.aggregation.rules.means import MeanProbs
from feddistill.aggregation.rules.rule import Memory, Rule, WeightKind
from feddistill.aggregation.rules.table import ASSUMED, RULES

__all__ = ["ASSUMED", "RULES", "MeanProbs", "Memory", "Rule", "WeightKind"]
