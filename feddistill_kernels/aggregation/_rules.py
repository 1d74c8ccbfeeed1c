"""The rules and the settings that each has."""

from typing import NamedTuple


class Rule(NamedTuple):
    """Names of the settings that a rule needs, and of those that it has besides."""

    needs: tuple[str, ...] = ()
    has: tuple[str, ...] = ()


RULES = {
    "mean_probs": Rule(has=("weights",)),
    "mean_logits": Rule(has=("weights",)),
    "median": Rule(),
    "trimmed_mean": Rule(needs=("trim",)),
    "mean_around_median": Rule(needs=("keep",)),
    "geometric_median": Rule(has=("tolerance", "max_iterations")),
    "krum": Rule(needs=("byzantine",), has=("keep",)),
}


class Settings(NamedTuple):
    """A rule and its settings; those that it does not have are not looked at."""

    rule: str
    trim: int = 0
    keep: int = 1
    byzantine: int = 0
    tolerance: float = 1e-6
    max_iterations: int = 64
    mix: int | None = None
