"""``feddistill bench``: the command of ``bench/``, which is installed as ``feddistill.bench``."""

from feddistill.engines.flower.server_app import main as bench

__all__ = ["bench"]
