"""Training: ``transformers.Trainer`` with the distillation losses of the tasks."""

from feddistill.training.loop import Trained, fit, steps_of
from feddistill.training.losses import BatchLoss, Examples, TextLoss
from feddistill.training.texts import TrainingExamples, example_loss

__all__ = [
    "BatchLoss",
    "Examples",
    "TextLoss",
    "Trained",
    "TrainingExamples",
    "example_loss",
    "fit",
    "steps_of",
]
