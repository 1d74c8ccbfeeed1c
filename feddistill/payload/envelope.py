"""Who sends what, for which round: the small JSON object beside a payload that vouches for its bytes."""

import hashlib
import re
from dataclasses import asdict, dataclass, fields

from feddistill.payload import refusals
from feddistill.payload.container import Malformed, parse_object
from feddistill.payload.request import canonical_json
from feddistill.types import RoundSpec

FORMAT = "feddistill-payload"
VERSION = "1"
ENVELOPE_LIMIT = 4096
CLIENT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields on the wire, by their names there."""

    format: str
    version: str
    run: str
    round: int
    client: str
    sequence: int
    """Which shard, from 0."""
    size: int
    """Of the payload, in bytes."""
    blake2b: str
    """Of the payload: 256 bits in hexadecimal."""

    def to_json(self) -> bytes:
        """The only bytes that say this."""
        return canonical_json(asdict(self))


def digest(content: bytes) -> str:
    """The hash by which an envelope knows its payload."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def seal(content: bytes, spec: RoundSpec, client: str, sequence: int = 0) -> bytes:
    """The envelope of a payload: who sends what, for which round, and the hash of its bytes."""
    return Envelope(
        FORMAT, VERSION, spec.run_id, spec.round, client, sequence, len(content), digest(content)
    ).to_json()


def parse_envelope(raw: bytes, spec: RoundSpec, sequence: int) -> Envelope:
    """The envelope, if it is well-formed and for this round.

    Until the client is known to be enrolled there is no name to use: messages say ``?``.

    Raises:
        Refusal: It is not.
    """
    if len(raw) > ENVELOPE_LIMIT:
        given, required = f"{len(raw)} bytes", f"at most {ENVELOPE_LIMIT} bytes"
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", required, given)
    try:
        found = parse_object(raw, "envelope")
    except Malformed as error:
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", error.required, error.given) from None
    kinds = {field.name: field.type for field in fields(Envelope)}
    if set(found) != set(kinds) or any(type(found[key]) is not kind for key, kind in kinds.items()):
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", f"an object of {sorted(kinds)}", found)
    envelope = Envelope(**found)
    if envelope.to_json() != raw:
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", "canonical JSON", "another form of it")
    _check_client(envelope.client, spec)
    expected: dict[str, tuple[type[refusals.Refusal], object]] = {
        "format": (refusals.MalformedEnvelope, FORMAT),
        "version": (refusals.MalformedEnvelope, VERSION),
        "run": (refusals.WrongRun, spec.run_id),
        "round": (refusals.WrongRound, spec.round),
        "sequence": (refusals.MalformedEnvelope, sequence),
    }
    for key, (refusal, value) in expected.items():
        if found[key] != value:
            raise refusal(envelope.client, spec.round, f"envelope, {key}", value, found[key])
    return envelope


def _check_client(client: str, spec: RoundSpec) -> None:
    if not CLIENT_NAME.fullmatch(client):
        required = "1 to 64 letters, digits, '_' and '-'"
        raise refusals.UnknownClient("?", spec.round, "client", required, client)
    if client not in spec.clients:
        raise refusals.UnknownClient("?", spec.round, "client", "enrolled in this round", client)
