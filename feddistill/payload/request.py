"""What a server asks, as the bytes that everyone hashes alike."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from feddistill.errors import DataError
from feddistill.payload.codecs import check_request
from feddistill.payload.keys import PUBLIC_KEY
from feddistill.types import ClientDescription, RoundSpec


def canonical_json(value: object) -> bytes:
    """The one JSON form of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def canonical(value: RoundSpec | ClientDescription) -> bytes:
    """A request, or what a client says of itself, as canonical JSON."""
    said = asdict(value)
    if not said.get("shard_rows", True):  # of answers in one piece nothing is said
        del said["shard_rows"]
    return canonical_json(said)


def parse_spec(raw: bytes) -> RoundSpec:
    """The request that ``canonical`` wrote.

    Raises:
        DataError: It is anything else, or no answer could meet it; equal requests must have equal digests.
    """
    try:
        spec = TypeAdapter(RoundSpec).validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "request"
        raise DataError(f"{place[:60]!a}: {first['msg'][:120]}: not the JSON of a request") from None
    if canonical(spec) != raw:
        raise DataError("request must be canonical JSON: sorted keys, no spaces, ASCII, no other fields")
    check_request(spec)
    for client, key in spec.keys:
        if not PUBLIC_KEY.fullmatch(key):
            raise DataError(f"request: the key of {client!a} must be 64 hexadecimal digits, got {key[:80]!a}")
    if len(dict(spec.keys)) < len(spec.keys):
        raise DataError("request: keys must name each client once")
    return spec


def spec_digest(spec: RoundSpec) -> str:
    """Hash of a request; an answer names it, so it answers this request and no other."""
    return hashlib.blake2b(canonical(spec), digest_size=16).hexdigest()


def fingerprint(names: Sequence[str]) -> str:
    """Hash of an ordered list of classes or tokens."""
    return hashlib.blake2b(canonical_json(list(names)), digest_size=16).hexdigest()
