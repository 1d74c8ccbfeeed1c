"""The table of aggregation rules.

A rule is a frozen value. Its fields are its settings, in a YAML file or on the command line; ``combine``
is its formula. Importing this does not import torch.

Shapes: ``C`` clients, ``n`` rows of ``N``, ``V`` classes or vocabulary, ``W`` columns of a block.
"""

from feddistill.aggregation.rules.choice import MinCe, Selective, Vote
from feddistill.aggregation.rules.distance import Cronus, GeometricMedian, Krum, MultiKrum
from feddistill.aggregation.rules.means import EnhancedEra, Era, MeanLogits, MeanProbs, PriorCorrected
from feddistill.aggregation.rules.order import MeanAroundMedian, Median, TrimmedMean
from feddistill.aggregation.rules.remembered import ExpGuard
from feddistill.aggregation.rules.rule import Memory, Rule, WeightKind
from feddistill.aggregation.rules.stacked import Stacked

__all__ = ["ASSUMED", "RULES", "MeanProbs", "Memory", "Rule", "WeightKind"]

ASSUMED = (
    "Assumed: fewer than half of the clients lie (f < C/2), and identities are enrolled, so that nobody "
    "enters under several names."
)
"""What stands in every report: no rule holds without it."""

RULES: dict[str, type[Rule]] = {
    "mean_probs": MeanProbs,
    "mean_logits": MeanLogits,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "mean_around_median": MeanAroundMedian,
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "cronus": Cronus,
    "era": Era,
    "enhanced_era": EnhancedEra,
    "min_ce": MinCe,
    "vote": Vote,
    "selective": Selective,
    "prior_corrected": PriorCorrected,
    "stacked": Stacked,
    "expguard": ExpGuard,
}
