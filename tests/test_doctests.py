"""Examples in docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the files: an editable install puts the whole tree into feddistill.__path__, and importing a kernel
# a second time under another name would register its operators twice.
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "feddistill").rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_are_right(name):
    if ".engines.flower." in name:
        pytest.importorskip("flwr", reason="Flower's own requirements conflict with the pinned ones")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0
