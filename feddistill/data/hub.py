"""Data sets in the layout of the Hugging Face hub: there, or in a local folder."""

import tempfile
from pathlib import Path
from typing import Any

from feddistill.errors import DataError


def load(place: str, subset: str | None, split: str, revision: str | None, name: str) -> Any:
    """A split of a data set, as ``datasets.load_dataset`` gives it.

    Args:
        place: A name of the hub, or a folder.
        subset: The hub's "configuration".
        split: As the data set calls it.
        revision: A commit, or ``None`` for the newest.
        name: What errors call it.

    Raises:
        DataError: No network, no such data set, subset or split, or files that cannot be read.
    """
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if not Path(place).is_dir():
            return datasets.load_dataset(place, subset, split=split, revision=revision)
        # The cache knows a folder by its last name: another of that name, or a file that has changed, would
        # give what was read before.
        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                place, subset, split=split, revision=revision, cache_dir=cache, keep_in_memory=True
            )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: cannot load data set {place!r}: {reason}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def columns(loaded: Any) -> dict[str, list[Any]]:
    """The columns as lists; classes by their names, ``None`` where one is not known."""
    import datasets

    found = {key: list(loaded[key]) for key in loaded.column_names}
    for key, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            found[key] = [None if v is None or v < 0 else feature.int2str(v) for v in found[key]]
    return found
