"""The request of a round as canonical bytes, whose hash is the same everywhere."""

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
    """The canonical JSON of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def canonical(value: RoundSpec | ClientDescription) -> bytes:
    """A request or a client's description as canonical JSON."""
    fields = asdict(value)
    if isinstance(value, RoundSpec) and not value.shard_rows:  # a request for one payload has no such field
        fields.pop("shard_rows")
    return canonical_json(fields)


def first_error(error: ValidationError, whole: str) -> str:
    """The field and message of the first error; ``whole`` names the value if no field is to blame."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or whole
    return f"{field[:60]!a}: {first['msg'][:120]}"


def parse_spec(raw: bytes) -> RoundSpec:
    """Read a request that ``canonical`` wrote.

    Raises:
        DataError: The bytes are not the canonical JSON of a request, or no answer could satisfy it.
    """
    try:
        spec = TypeAdapter(RoundSpec).validate_json(raw, strict=True)
    except ValidationError as error:
        raise DataError(f"{first_error(error, 'request')}: not the JSON of a request") from None
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
    """Hash of a request; an answer contains it, so that it cannot be used for another request."""
    return hashlib.blake2b(canonical(spec), digest_size=16).hexdigest()


def fingerprint(names: Sequence[str]) -> str:
    """Hash of an ordered list of classes or tokens."""
    return hashlib.blake2b(canonical_json(list(names)), digest_size=16).hexdigest()
