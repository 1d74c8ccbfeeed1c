"""What can go wrong that the user can mend.

FeddistillError
├── ConfigError (ValueError)   a setting, named as the user wrote it
├── DataError                  a file, a data set, a label, a client without data
├── ModelError                 a model that cannot be found, or cannot do what is asked of it
├── PayloadError               what a client sent; one subclass for each refusal
├── RoundError                 too few valid answers
└── RunError                   a run directory: in the way, not a run, damaged, or no room to write
"""


class FeddistillError(Exception):
    """Printed as one line, exit status 2; anything else is a bug and keeps its traceback."""


class ConfigError(FeddistillError, ValueError):
    """A setting is missing, unknown or out of range."""


class DataError(FeddistillError):
    """A file or data set is missing, empty, malformed, or does not fit the others."""


class ModelError(FeddistillError):
    """A model or tokenizer cannot be found, or cannot do what the configuration asks."""


class PayloadError(FeddistillError):
    """A client's payload was refused; nothing of it was kept."""


class RoundError(FeddistillError):
    """A round cannot go on: fewer valid answers than the quorum."""


class RunError(FeddistillError):
    """A run directory is in the way, is not one, does not match, or cannot be written."""
