"""What a server publishes of each round: hashes of everything that decided, each over the one before.

A request names the head of the ledger so far, and an answer names its request: so whoever has kept a request
and an answer of a later round can tell whether the rounds before are still told as they were.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from feddistill.errors import DataError
from feddistill.payload.request import canonical_json

DOMAIN = b"feddistill-ledger-1\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """One round. Hashes are those of an envelope: BLAKE2b, 256 bits in hexadecimal."""

    round: int
    previous: str
    """Head of the ledger before this round; nothing before the first."""
    request: str
    """Of the request's canonical JSON."""
    payloads: Mapping[str, str]
    """By client, of each payload that was admitted."""
    refused: Mapping[str, str]
    """By client, why its payload was not: the name of the refusal."""
    teacher: str
    """Of what the rule made of the payloads, as the student learned from it."""
    feedback: str
    """Of the payload in which clients are sent the teacher."""

    def head(self) -> str:
        """Of the ledger, this round included."""
        return hashlib.blake2b(DOMAIN + canonical_json(asdict(self)), digest_size=32).hexdigest()


def parse_entries(found: Any) -> tuple[Entry, ...]:
    """Entries as they were published, in order and chained.

    Raises:
        DataError: Something else, or an entry that does not follow from the one before.
    """
    try:
        entries = TypeAdapter(tuple[Entry, ...]).validate_python(found, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "ledger"
        raise DataError(f"ledger: {place[:60]!a}: {first['msg'][:120]}") from None
    check_chain(entries)
    return entries


def check_chain(entries: Sequence[Entry]) -> None:
    """Raise ``DataError`` for an entry that does not follow from the one before."""
    head = ""
    for number, entry in enumerate(entries, 1):
        if entry.round != number:
            raise DataError(f"ledger: round {number} is missing, round {entry.round} stands in its place")
        if entry.previous != head:
            raise DataError(
                f"ledger: round {number} follows {entry.previous[:16] or 'nothing'}..., "
                f"but the ledger before it ends in {head[:16] or 'nothing'}..."
            )
        head = entry.head()
