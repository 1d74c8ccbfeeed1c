"""Payload format v1: a client's answers as bytes that a server can check (``docs/payload.md``).

``quantise_*`` make an answer of log-probabilities, ``encode`` and ``seal`` the two things that travel,
``admit`` takes them in or refuses them; nothing that ``admit`` returns is anything but well-formed.
"""

from feddistill.payload.admission import admit, bound, encode, read
from feddistill.payload.answers import (
    Answers,
    Dense,
    Ranked,
    Sampled,
    expand,
    max_code_of,
    quantise_dense,
    quantise_sampled,
    quantise_threshold,
    quantise_topk,
    unigram_spread,
)
from feddistill.payload.envelope import VERSION, Envelope, digest, seal
from feddistill.payload.ledger import Entry, parse_entries
from feddistill.payload.request import canonical, fingerprint, parse_spec, spec_digest

__all__ = [
    "VERSION",
    "Answers",
    "Dense",
    "Entry",
    "Envelope",
    "Ranked",
    "Sampled",
    "admit",
    "bound",
    "canonical",
    "digest",
    "encode",
    "expand",
    "fingerprint",
    "max_code_of",
    "parse_entries",
    "parse_spec",
    "quantise_dense",
    "quantise_sampled",
    "quantise_threshold",
    "quantise_topk",
    "read",
    "seal",
    "spec_digest",
    "unigram_spread",
]
