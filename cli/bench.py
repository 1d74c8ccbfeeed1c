"""``feddistill bench``: the command of ``bench/``, which is installed as ``feddistill.bench``."""

from feddistill.bench.__main__ import main as bench

__all__ = ["bench"]
