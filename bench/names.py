"""Choices of the command line.  This module imports nothing, so that ``--help`` is instant."""

FAMILY = {
    "distillation_loss": "distillation",
    "softmax_divergence": "distillation",
    "topk_compress": "topk",
    "coordinate_median": "order_statistics",
    "trimmed_mean": "order_statistics",
    "geometric_median": "distances",
    "krum": "distances",
    "nearest_neighbour_mixing": "distances",
    "aggregate_topk": "aggregation",
    "linear_distillation_loss": "linear_distillation",
}
"""Public function to the operator that implements it, as ``available_backends`` names it."""

PEERS = ("liger", "cut_cross_entropy", "byzfl", "distillkit")
"""Other libraries."""

FAMILIES = ("eager", "compile", *PEERS)
"""Choices of ``--compare``."""

BACKENDS = ("native", "triton")
"""Our backends that compete under their own names on a GPU."""
