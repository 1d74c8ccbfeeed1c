"""Our competitors in a result file."""

from typing import Any

from .names import BACKENDS, PEERS

_OTHERS = {"ours", "products", "compile", *PEERS, *BACKENDS}


def medians(case: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds by contender; those that failed are left out."""
    entries = case["implementations"].items()
    return {name: entry["median_ms"] for name, entry in entries if "median_ms" in entry}


def written_by_hand(case: dict[str, Any]) -> list[str]:
    """Names of a case's contenders that are plain PyTorch."""
    return [name for name in medians(case) if name not in _OTHERS]


def rivals(case: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of the competitors: the fastest plain PyTorch form, torch.compile, each peer."""
    found = medians(case)
    plain = [found[name] for name in written_by_hand(case)]
    rivals = {"PyTorch": min(plain)} if plain else {}
    if "compile" in found:
        rivals["torch.compile"] = found["compile"]
    return rivals | {name: found[name] for name in PEERS if name in found}
