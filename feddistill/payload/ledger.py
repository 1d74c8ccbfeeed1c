"""The ledger that a server publishes: a hash chain of each round's request, payloads and teacher.

A request contains the head of the ledger so far, and an answer contains the digest of its request. A client
that kept a later request can therefore check that the server has not changed earlier rounds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from feddistill.errors import DataError
from feddistill.payload.request import canonical_json, first_error

DOMAIN = b"feddistill-ledger-1\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """One round. Hashes are as in an envelope: BLAKE2b, 256 bits in hexadecimal."""

    round: int
    previous: str
    """Head of the ledger before this round; empty in the first."""
    request: str
    """Hash of the request's canonical JSON."""
    payloads: Mapping[str, str]
    """By client, the hash of each payload that was admitted."""
    refused: Mapping[str, str]
    """By client, the name of the refusal of its payload."""
    teacher: str
    """Hash of the teacher that the student learned from."""
    feedback: str
    """Hash of the payload in which the clients receive the teacher."""

    def head(self) -> str:
        """The head of the ledger after this round."""
        return hashlib.blake2b(DOMAIN + canonical_json(asdict(self)), digest_size=32).hexdigest()


def parse_entries(published: Any) -> tuple[Entry, ...]:
    """Read the published entries and check their chain.

    Raises:
        DataError: They are not entries of a ledger, or an entry does not follow from the one before.
    """
    try:
        entries = TypeAdapter(tuple[Entry, ...]).validate_python(published, strict=False)
    except ValidationError as error:
        raise DataError(f"ledger: {first_error(error, 'ledger')}") from None
    check_chain(entries)
    return entries


def check_chain(entries: Sequence[Entry]) -> None:
    """Raise ``DataError`` if an entry does not follow from the one before."""
    head = ""
    for number, entry in enumerate(entries, 1):
        if entry.round != number:
            raise DataError(f"ledger: round {number} is missing, round {entry.round} is in its place")
        if entry.previous != head:
            raise DataError(
                f"ledger: round {number} follows {entry.previous[:16] or 'nothing'}..., "
                f"but the ledger before it ends in {head[:16] or 'nothing'}..."
            )
        head = entry.head()
