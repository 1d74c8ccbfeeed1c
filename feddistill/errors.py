"""Errors that the user can correct.

FeddistillError
├── ConfigError (ValueError)   a setting, named as the user wrote it
├── DataError                  a file, a data set, a label, a client without data
├── ModelError                 a model that cannot be found, or cannot do what the settings require
├── PayloadError               an invalid payload; one subclass for each refusal
├── RoundError                 too few valid uploads
└── RunError                   a run directory: exists already, not a run, damaged, or not writable
"""


class FeddistillError(Exception):
    """Printed as one line, exit status 2; anything else is a bug and keeps its traceback."""


class ConfigError(FeddistillError, ValueError):
    """A setting is missing, unknown or out of range."""


class DataError(FeddistillError):
    """A file or data set is missing, empty, malformed, or does not fit the others."""


class ModelError(FeddistillError):
    """A model or tokenizer cannot be found, or cannot do what the settings require."""


class PayloadError(FeddistillError):
    """A client's payload was refused; nothing of it was stored."""


class RoundError(FeddistillError):
    """A round cannot continue: fewer valid uploads than the quorum."""


class RunError(FeddistillError):
    """A run directory exists already, is not one, does not match, or cannot be written."""
