"""The recipe of training: what is computed from equal settings and data, by number.

A run stores the number of its recipe. A version with another recipe reads the run but does not continue it,
because its figures would belong to neither.

1. Runs without a number.
2. Frozen layers have no dropout, with or without ``frozen_cache_mb``; the cache computes texts of equal
   length together; texts are padded to a multiple of four tokens, not eight; on a CPU, models of texts of at
   most 32 tokens have transformers' eager attention; AdamW is fused.
3. The loss of an optimiser step is divided by the terms of the whole step; a masked language model's masks
   depend on step and block; Dirichlet partitions are multinomial draws; texts of language models begin as
   ``language.text_start`` says.
"""

from feddistill.errors import RunError
from feddistill.store.layout import RECIPE
from feddistill.store.run_directory import Json, RunDirectory

NUMBER = 3
DIVIDED = 3
"""Runs with an older recipe divided the private texts among the clients otherwise."""


def stored(run: RunDirectory) -> int:
    """The number of the recipe that ``run`` was started with."""
    return int(run.read_json(RECIPE)["recipe"]) if run.path(RECIPE).exists() else 1


def write(run: RunDirectory, settings: Json) -> None:
    """Store the number of this version's recipe in a new run, and its settings: a file can be edited."""
    run.write_json(RECIPE, {"recipe": NUMBER, "settings": settings})


def check(run: RunDirectory) -> None:
    """Raise ``RunError`` if ``run`` was started with another recipe than this version's."""
    if (number := stored(run)) != NUMBER:
        raise RunError(
            f"{run.root} was started with recipe {number} of training, this version has recipe {NUMBER}: it "
            "cannot be resumed, only read; start a new run, or use the version of feddistill that started it"
        )
