"""Data sets of the Hugging Face hub, or of a local folder in the same layout."""

import csv
import tempfile
from pathlib import Path
from typing import Any

from feddistill.errors import DataError


def load(place: str, subset: str | None, split: str, revision: str | None, name: str) -> Any:
    """Load a split of a data set with ``datasets.load_dataset``.

    Args:
        place: Name on the hub, or a folder.
        subset: The hub's "configuration".
        split: Name of the split.
        revision: A commit; ``None`` for the newest.
        name: Its name in errors.

    Raises:
        DataError: No network, no such data set, subset or split, or files that cannot be read.
    """
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(place, subset, revision=revision)
        # datasets reads tsv as if it were csv: a quotation mark would join the lines up to the next one.
        unquoted = {"quoting": csv.QUOTE_NONE} if getattr(builder.config, "sep", None) == "\t" else {}
        if not Path(place).is_dir():
            return datasets.load_dataset(place, subset, split=split, revision=revision, **unquoted)
        # The cache identifies a folder by its last name: another folder of that name, or a changed file,
        # would give the old content.
        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                place,
                subset,
                split=split,
                revision=revision,
                cache_dir=cache,
                keep_in_memory=True,
                **unquoted,
            )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets wraps what a file's reader says
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise DataError(f"{name}: cannot load data set {place!r}: {reason}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def columns(loaded: Any) -> dict[str, list[Any]]:
    """The columns as lists; class labels as names, ``None`` for unknown ones."""
    values = {key: list(loaded[key]) for key in loaded.column_names}
    for key in class_labels(loaded):
        name_of = loaded.features[key].int2str
        values[key] = [None if v is None or v < 0 else name_of(v) for v in values[key]]
    return values


def class_labels(loaded: Any) -> frozenset[str]:
    """The columns of which the data set knows the classes."""
    import datasets

    return frozenset(key for key, of in loaded.features.items() if isinstance(of, datasets.ClassLabel))
