"""The methods: one file each over the same stages, data, models, evaluation and accounting."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, get_args

from feddistill.config import Baseline
from feddistill.methods.check import check

if TYPE_CHECKING:
    from feddistill.methods.learner import Session
    from feddistill.store import Json

__all__ = ["METHODS", "check", "load"]

METHODS = ("feddistill", *get_args(Baseline))
"""Modules of this package with a ``run(session)``."""


def load(name: str) -> "Callable[[Session], Json]":
    """The ``run`` of the method called ``name``."""
    method: Callable[[Session], Json] = import_module(f"feddistill.methods.{name}").run
    return method
