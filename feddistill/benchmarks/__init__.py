"""Public benchmarks of a trained student: GLUE, SuperGLUE, SQuAD, WikiText and others."""

from feddistill.benchmarks.run import Request, evaluate

__all__ = ["Request", "evaluate"]
