"""Typed records of steps and rounds.

``RunDirectory.done(step)`` returns the JSON that ``RunDirectory.commit`` has written, which ``from_json``
reads; ``as_json`` is its inverse. A missing field and ``null`` are the same.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Self

from pydantic import TypeAdapter

from feddistill.types import Cost

Metrics = Mapping[str, Any]
"""By name; those of a task are in ``config.tasks``."""


class Record:
    """Base of the records: from JSON and back."""

    __slots__ = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read the content of a record.

        Raises:
            pydantic.ValidationError: A field is missing or has another type.
        """
        return TypeAdapter(cls).validate_python(content)

    def as_json(self) -> dict[str, Any]:
        """The content as it is written."""
        return _object(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic(Record):
    """Bytes of a round or of a method, all clients together."""

    uplink: int = 0
    downlink: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRecord(Record):
    """A pass of answers."""

    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord(Record):
    """One training: of a client's model, of the student, or of a baseline in a round."""

    weights: str | None = None
    """File in the run's folder."""
    validation: Metrics | None = None
    test: Metrics | None = None
    trained: Mapping[str, Any] | None = None
    """Steps, loss and loss curve."""
    costs: Mapping[str, Cost]
    """By phase: ``train``, ``evaluate``, ``answer`` and others."""
    bytes: Traffic | None = None
    missing: list[str] | None = None
    """Clients that did not take part in the round."""

    @property
    def file(self) -> str:
        """The weights of a step that has left some."""
        assert self.weights is not None, "a query-only model has no weights"
        return self.weights

    @property
    def training(self) -> Cost:
        """The cost of the training itself."""
        return self.costs["train"]

    @property
    def on_test(self) -> Metrics:
        """Metrics on the test set of a model that was evaluated."""
        assert self.test is not None, "the step was evaluated"
        return self.test

    @property
    def on_validation(self) -> Metrics:
        """Metrics on the validation set of a model that was evaluated."""
        assert self.validation is not None, "the step was evaluated"
        return self.validation


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRecord(Record):
    """A client's answer to one request."""

    shards: int
    bytes: int
    cost: Cost
    projection: Mapping[str, Any] | None = None
    """How predictions were projected to the student's vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecord(Record):
    """The aggregate of a round."""

    log_probs: str
    """File in the run's folder."""
    feedback: str
    """Hash of the payload in which clients receive the teacher."""
    feedback_bytes: int
    diagnostics: Mapping[str, Any]
    """Fields of ``aggregation.diagnostics.Diagnostics``."""
    memory: Mapping[str, Any]
    """State of the aggregation rule for the next round."""
    cost: Cost

    @property
    def collapsed(self) -> list[str]:
        """Clients that give nearly the same answer to every text."""
        return list(self.diagnostics["collapsed"])

    @property
    def duplicates(self) -> list[list[str]]:
        """Pairs of clients with nearly equal answers."""
        return list(self.diagnostics["duplicates"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTraffic(Record):
    """Bytes of a round by client."""

    uplink: Mapping[str, int]
    downlink: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord(Record):
    """A round of federated distillation; without ``student`` and ``bytes`` if it only made a teacher."""

    round: int
    specialists: Mapping[str, StepRecord]
    uploads: Mapping[str, UploadRecord]
    refused: Mapping[str, str]
    missing: list[str]
    teacher: TeacherRecord
    ledger: Mapping[str, Any]
    """The fields of ``payload.Entry``."""
    student: StepRecord | None = None
    bytes: ClientTraffic | None = None

    @property
    def trained_student(self) -> StepRecord:
        """The student of a round that is whole."""
        assert self.student is not None, "the round is whole"
        return self.student

    @property
    def traffic(self) -> ClientTraffic:
        """The bytes of a round that is whole."""
        assert self.bytes is not None, "the round is whole"
        return self.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationRecord(Record):
    """All rounds of federated distillation."""

    rounds: list[RoundRecord]
    ledger: str
    """Head of the ledger."""
    description_bytes: int
    positions: int
    student_bytes: int
    """Bytes of the weights that the student trains, in float32."""
    lora_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRecord(Record):
    """A baseline: one model by round, or one model a client by round."""

    rounds: list[StepRecord] | None = None
    clients: Mapping[str, list[StepRecord]] | None = None
    bytes: Traffic = field(default_factory=Traffic)
    """Bytes of one round of a method with one model a client."""


def _object(value: Any) -> dict[str, Any]:
    pairs = ((each.name, getattr(value, each.name)) for each in fields(value))
    return {name: _plain(inner) for name, inner in pairs if inner is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return _object(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
