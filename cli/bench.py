"""``feddistill bench``: the command in ``bench/``, installed as ``feddistill.bench``."""

from feddistill.bench.__main__ import main as bench

__all__ = ["bench"]
