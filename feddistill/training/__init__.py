"""Training: ``transformers.Trainer`` with the distillation losses of the tasks."""

from feddistill.training.loop import Trained, fit, steps_of
from feddistill.training.texts import Lessons, lesson_loss

__all__ = ["Lessons", "Trained", "fit", "lesson_loss", "steps_of"]
