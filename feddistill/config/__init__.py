"""The configuration of a run: YAML, checked, with every default filled in."""

from feddistill.config.load import differs, digest, dump, load, one_line, override, parse, texts, untied
from feddistill.config.settings import QUICKSTART, Config

__all__ = [
    "QUICKSTART",
    "Config",
    "differs",
    "digest",
    "dump",
    "load",
    "one_line",
    "override",
    "parse",
    "texts",
    "untied",
]
