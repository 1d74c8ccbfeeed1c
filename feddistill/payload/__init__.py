"""Payload format v1: a client's answers as bytes that a server can check (``docs/payload.md``).

``quantise_*`` make an answer of log-probabilities, ``encode`` and ``seal`` the two things that travel,
``admit`` takes them in or refuses them; nothing that ``admit`` returns is anything but well-formed.
"""

from feddistill.payload.admission import (
    VERSION,
    admit,
    bound,
    canonical,
    encode,
    fingerprint,
    read,
    seal,
    spec_digest,
)
from feddistill.payload.answers import Answers, Dense, Ranked, quantise_dense, quantise_topk

__all__ = [
    "VERSION",
    "Answers",
    "Dense",
    "Ranked",
    "admit",
    "bound",
    "canonical",
    "encode",
    "fingerprint",
    "quantise_dense",
    "quantise_topk",
    "read",
    "seal",
    "spec_digest",
]
