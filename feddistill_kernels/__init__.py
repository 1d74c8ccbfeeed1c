"""Losses, compression and robust aggregation for knowledge distillation: tensors in, tensors out.

Fixed letters: ``N`` rows, ``V`` vocabulary or classes, ``K`` kept entries a row, ``C`` clients.
"""

from feddistill_kernels._backend import BackendError, available_backends, operators, use_backend
from feddistill_kernels._native import build_info
from feddistill_kernels.aggregation import aggregate_topk, rules
from feddistill_kernels.distances import geometric_median, krum, nearest_neighbour_mixing
from feddistill_kernels.distillation import DistillationLoss, distillation_loss, kinds, softmax_divergence
from feddistill_kernels.linear_distillation import (
    LinearDistillationLoss,
    TeacherHead,
    linear_distillation_loss,
)
from feddistill_kernels.order_statistics import coordinate_median, mean_around_median, trimmed_mean
from feddistill_kernels.topk import TopK, topk_compress, topk_sample

__all__ = [
    "BackendError",
    "DistillationLoss",
    "LinearDistillationLoss",
    "TeacherHead",
    "TopK",
    "aggregate_topk",
    "available_backends",
    "build_info",
    "coordinate_median",
    "distillation_loss",
    "geometric_median",
    "kinds",
    "krum",
    "linear_distillation_loss",
    "mean_around_median",
    "nearest_neighbour_mixing",
    "operators",
    "rules",
    "softmax_divergence",
    "topk_compress",
    "topk_sample",
    "trimmed_mean",
    "use_backend",
]
