"""What clients say beside their payloads: read strictly and cut to what is used, before any of it is kept."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from feddistill.aggregation.rules.rule import Need
from feddistill.store.run_directory import Json
from feddistill.types import ClientDescription, Cost

MOST = 2.0**40
"""Of texts, or of seconds: more is not believed."""
MOST_WORK = 2.0**100
"""Of operations, or of bytes of memory."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Trained:
    costs: dict[str, Cost]
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)


def description(said: object, client: str, needs: Collection[Need], classes: int) -> ClientDescription | None:
    """What ``client`` says of itself: what the rule ``needs``, and nothing else; ``None`` where it does not.

    >>> description({"client": "north", "examples": 12}, "north", {"size"}, 3)
    ClientDescription(client='north', examples=12, class_counts=None)
    >>> description({"client": "north", "class_counts": [1, 2]}, "north", {"class_counts"}, 3)
    """
    found = _as(ClientDescription, said)
    if found is None or found.client != client:
        return None
    size = found.examples if "size" in needs else None
    counts = found.class_counts if "class_counts" in needs else None
    if "size" in needs and not (size is not None and 1 <= size <= MOST):
        return None
    if "class_counts" in needs and not (
        counts is not None and len(counts) == classes and all(0 <= count <= MOST for count in counts)
    ):
        return None
    return ClientDescription(client, size, counts)


def training(said: object, *, figures: bool) -> Json | None:
    """What a client's training came to: what it cost and, where the server's user is the client's, how good
    the model is; ``None`` where it does not say so."""
    found = _as(_Trained, said)
    if found is None or "train" not in found.costs or not all(map(_is_cost, found.costs.values())):
        return None
    record: Json = {"costs": {name: asdict(cost) for name, cost in found.costs.items()}}
    shown: Mapping[str, dict[str, float]] = {"validation": found.validation, "test": found.test}
    return record | ({name: of for name, of in shown.items() if of} if figures else {})


def cost(said: object) -> Cost:
    """What a client says that its work cost; nothing where it says something else."""
    found = _as(Cost, said)
    return found if found is not None and _is_cost(found) else Cost()


def _is_cost(found: Cost) -> bool:
    return (
        math.isfinite(found.seconds)
        and 0 <= found.seconds <= MOST
        and 0 <= found.flops <= MOST_WORK
        and 0 <= found.peak_memory_bytes <= MOST_WORK
    )


def _as(kind: type[T], said: object) -> T | None:
    """Of exactly this form: no text that reads like a number, no number where a whole one is due."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(said), strict=True)
    except (ValidationError, TypeError, ValueError, RecursionError):
        return None
