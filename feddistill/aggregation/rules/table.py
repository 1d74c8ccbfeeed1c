"""The table of aggregation rules.

Importing this module does not import torch.
"""

from feddistill.aggregation.rules.choice import MinCe, Selective, Vote
from feddistill.aggregation.rules.distance import Cronus, GeometricMedian, Krum, MultiKrum
from feddistill.aggregation.rules.means import EnhancedEra, Era, MeanLogits, MeanProbs, PriorCorrected
from feddistill.aggregation.rules.order import MeanAroundMedian, Median, TrimmedMean
from feddistill.aggregation.rules.remembered import ExpGuard
from feddistill.aggregation.rules.rule import Rule
from feddistill.aggregation.rules.stacked import Stacked

ASSUMED = (
    "Assumed: fewer than half of the clients lie (f < C/2), and identities are enrolled, so that nobody "
    "enters under several names."
)
"""Every result states it: no guarantee of a rule holds without it. Results store these words."""

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
