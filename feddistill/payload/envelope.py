"""The envelope: a small JSON object beside a payload with its sender, round, hash and signature."""

import hashlib
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from feddistill.payload import refusals
from feddistill.payload.container import Malformed, parse_object
from feddistill.payload.keys import SIGNATURE, PrivateKey, verify
from feddistill.payload.request import canonical_json
from feddistill.types import RoundSpec

FORMAT = "feddistill-payload"
VERSION = "1"
ENVELOPE_LIMIT = 4096
CLIENT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
DOMAIN = b"feddistill-envelope-1\n"
"""Prefix of the signed bytes, so that no signature made for another purpose fits an envelope."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields, named as on the wire."""

    format: str
    version: str
    run: str
    round: int
    client: str
    sequence: int
    """The shard, from 0."""
    size: int
    """Size of the payload in bytes."""
    blake2b: str
    """Hash of the payload: 256 bits in hexadecimal."""
    expires: int | None
    """Seconds since 1970 (UTC), the last time to admit it; ``None`` in a round without a deadline."""
    signature: str | None
    """Ed25519 in hexadecimal; ``None`` in a round without keys."""

    def to_json(self) -> bytes:
        """The canonical JSON."""
        return canonical_json(asdict(self))

    def signed(self) -> bytes:
        """The bytes to sign: a domain prefix and every field but the signature."""
        signed = {name: value for name, value in asdict(self).items() if name != "signature"}
        return DOMAIN + canonical_json(signed)


def digest(content: bytes | memoryview) -> str:
    """The hash of a payload in its envelope."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def seal(
    content: bytes,
    spec: RoundSpec,
    client: str,
    sequence: int = 0,
    *,
    key: PrivateKey | None = None,
    expires: int | None = None,
) -> bytes:
    """Make the envelope of a payload, signed if the round has keys.

    Args:
        content: The payload, from ``encode``.
        spec: The request that it answers.
        client: Name of the client.
        sequence: The shard.
        key: The client's private key, needed if the round enrolled keys.
        expires: Time after which the answer must not be admitted; default: the round's deadline.

    Raises:
        ValueError: ``key`` is not the enrolled one, or ``expires`` is given in a round without a deadline.
    """
    if spec.deadline is None and expires is not None:
        raise ValueError("expires needs a round with a deadline")
    expires = spec.deadline if expires is None else expires
    run, size = spec.run_id, len(content)
    envelope = Envelope(
        FORMAT, VERSION, run, spec.round, client, sequence, size, digest(content), expires, None
    )
    if spec.keys:
        enrolled = dict(spec.keys).get(client)
        if key is None or key.public != enrolled:
            raise ValueError(f"the round enrolled key {enrolled} for {client}")
        envelope = replace(envelope, signature=key.sign(envelope.signed()))
    return envelope.to_json()


def parse_envelope(raw: bytes, spec: RoundSpec, sequence: int, now: int | None) -> Envelope:
    """Read and check an envelope for shard ``sequence`` of ``spec`` at time ``now``.

    Errors name the client as ``?`` until it is known to be enrolled.

    Raises:
        Refusal: The envelope is malformed, not its client's, or not for this round.
    """
    if len(raw) > ENVELOPE_LIMIT:
        given, required = f"{len(raw)} bytes", f"at most {ENVELOPE_LIMIT} bytes"
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", required, given)
    try:
        parsed = parse_object(bytes(raw), "envelope")
    except Malformed as error:
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", error.required, error.given) from None
    if not _has_the_fields(parsed):
        names = sorted(field.name for field in fields(Envelope))
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", f"an object of {names}", parsed)
    envelope = Envelope(**parsed)
    if envelope.to_json() != raw:
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", "canonical JSON", "another form of it")
    _check_client(envelope.client, spec)
    for key, value in {"format": FORMAT, "version": VERSION}.items():
        _same(envelope, spec, key, value, refusals.MalformedEnvelope)
    _check_signature(envelope, spec)
    _same(envelope, spec, "run", spec.run_id, refusals.WrongRun)
    _same(envelope, spec, "round", spec.round, refusals.WrongRound)
    _same(envelope, spec, "sequence", sequence, refusals.MalformedEnvelope)
    _check_expiry(envelope, spec, now)
    return envelope


def _has_the_fields(parsed: dict[str, Any]) -> bool:
    kinds: dict[str, tuple[type, ...]] = {field.name: (str,) for field in fields(Envelope)}
    kinds |= dict.fromkeys(("round", "sequence", "size"), (int,))
    kinds |= {"expires": (int, type(None)), "signature": (str, type(None))}
    return set(parsed) == set(kinds) and all(type(parsed[key]) in kind for key, kind in kinds.items())


def _same(envelope: Envelope, spec: RoundSpec, key: str, value: object, kind: type[refusals.Refusal]) -> None:
    if (given := getattr(envelope, key)) != value:
        raise kind(envelope.client, spec.round, f"envelope, {key}", value, given)


def _check_client(client: str, spec: RoundSpec) -> None:
    if not CLIENT_NAME.fullmatch(client):
        required = "1 to 64 letters, digits, '_' and '-'"
        raise refusals.UnknownClient("?", spec.round, "client", required, client)
    if client not in spec.clients:
        raise refusals.UnknownClient("?", spec.round, "client", "enrolled in this round", client)


def _check_signature(envelope: Envelope, spec: RoundSpec) -> None:
    client, signature, field = envelope.client, envelope.signature, "envelope, signature"
    if not spec.keys:
        if signature is not None:  # it could not be checked
            required = "null: this round enrolled no keys"
            raise refusals.BadSignature(client, spec.round, field, required, signature)
        return
    enrolled = dict(spec.keys).get(client)
    if enrolled is None:
        raise refusals.UnknownClient(client, spec.round, "key", "enrolled in this round", "none")
    required = f"made with the key {enrolled[:16]}..."
    if signature is None:
        raise refusals.MissingSignature(client, spec.round, field, required, "null")
    if not SIGNATURE.fullmatch(signature):
        raise refusals.BadSignature(client, spec.round, field, "128 hexadecimal digits", signature)
    if not verify(enrolled, signature, envelope.signed()):
        raise refusals.BadSignature(client, spec.round, field, required, signature)


def _check_expiry(envelope: Envelope, spec: RoundSpec, now: int | None) -> None:
    expires, field = envelope.expires, "envelope, expires"
    if (expires is None) != (spec.deadline is None):
        required = "null: this round has no deadline" if spec.deadline is None else "a time"
        raise refusals.MalformedEnvelope(envelope.client, spec.round, field, required, expires)
    if expires is not None and now is not None and now > expires:
        raise refusals.Expired(envelope.client, spec.round, field, f"{now} or later", expires)
