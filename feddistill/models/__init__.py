"""Models and tokenizers: sources, layers kept, frozen parts, adapters, heads."""

from feddistill.models.frozen import FrozenLayers
from feddistill.models.layers import cut, depth
from feddistill.models.specialist import (
    PROJECTIONS,
    MeanPoolClassifier,
    Specialist,
    build,
    embeddings,
    head_parameters,
    loaded,
    read,
    reads,
    reads_types,
    remember_frozen,
    restore,
    save,
    take,
    trained,
    trained_count,
)

__all__ = [
    "PROJECTIONS",
    "FrozenLayers",
    "MeanPoolClassifier",
    "Specialist",
    "build",
    "cut",
    "depth",
    "embeddings",
    "head_parameters",
    "loaded",
    "read",
    "reads",
    "reads_types",
    "remember_frozen",
    "restore",
    "save",
    "take",
    "trained",
    "trained_count",
]
