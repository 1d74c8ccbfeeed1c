"""Evaluation of a trained student on public benchmarks: GLUE, SuperGLUE, SQuAD, WikiText and others."""

from feddistill.benchmarks.run import Request, evaluate

__all__ = ["Request", "evaluate"]
