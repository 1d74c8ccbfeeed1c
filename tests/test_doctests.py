"""Examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import feddistill

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(feddistill.__path__, "feddistill.") if ".cli" not in m.name
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_are_right(name):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0
