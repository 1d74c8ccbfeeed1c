"""Federated distillation of open language models.

Importing this package imports neither torch nor transformers; its stages do, when they are used.
"""

from importlib.metadata import version

__version__ = version("feddistill")
