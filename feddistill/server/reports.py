"""Validate the metadata that clients send beside their payloads; unknown fields are dropped."""

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
"""Largest accepted number of texts or of seconds."""
MOST_WORK = 2.0**100
"""Largest accepted number of operations or of bytes of memory."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Trained:
    costs: dict[str, Cost]
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)


def description(
    content: object, client: str, needs: Collection[Need], classes: int
) -> ClientDescription | None:
    """The description of ``client``, cut to what the rule ``needs``; ``None`` if that is missing or invalid.

    >>> description({"client": "north", "examples": 12}, "north", {"size"}, 3)
    ClientDescription(client='north', examples=12, class_counts=None)
    >>> description({"client": "north", "class_counts": [1, 2]}, "north", {"class_counts"}, 3)
    """
    described = _as(ClientDescription, content)
    if described is None or described.client != client:
        return None
    size = described.examples if "size" in needs else None
    counts = described.class_counts if "class_counts" in needs else None
    if "size" in needs and not (size is not None and 1 <= size <= MOST):
        return None
    if "class_counts" in needs and not (
        counts is not None and len(counts) == classes and all(0 <= count <= MOST for count in counts)
    ):
        return None
    return ClientDescription(client, size, counts)


def training(content: object, *, metrics: bool) -> Json | None:
    """A client's training record: costs and, in a simulation, metrics; ``None`` if it has another form."""
    trained = _as(_Trained, content)
    if trained is None or "train" not in trained.costs or not all(map(_is_cost, trained.costs.values())):
        return None
    record: Json = {"costs": {name: asdict(cost) for name, cost in trained.costs.items()}}
    shown: Mapping[str, dict[str, float]] = {"validation": trained.validation, "test": trained.test}
    return record | ({name: values for name, values in shown.items() if values} if metrics else {})


def cost(content: object) -> Cost:
    """The cost that a client reports; zero if it has another form."""
    reported = _as(Cost, content)
    return reported if reported is not None and _is_cost(reported) else Cost()


def _is_cost(cost: Cost) -> bool:
    return (
        math.isfinite(cost.seconds)
        and 0 <= cost.seconds <= MOST
        and 0 <= cost.flops <= MOST_WORK
        and 0 <= cost.peak_memory_bytes <= MOST_WORK
    )


def _as(kind: type[T], content: object) -> T | None:
    """``content`` as ``kind``, without conversions (strict); ``None`` if it has another form."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except (ValidationError, TypeError, ValueError, RecursionError):
        return None
