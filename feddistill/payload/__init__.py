"""Payload format v1: a client's answers as bytes that a server can check (``docs/payload.md``).

``quantise_*`` make an answer of log-probabilities, ``encode`` and ``seal`` the two things that travel,
``admit`` takes them in or refuses them; nothing that ``admit`` returns is anything but well-formed.
"""

from feddistill.payload.admission import admit, bound, encode, read, reread
from feddistill.payload.answers import (
    Answers,
    Dense,
    Ranked,
    Sampled,
    expand,
    joined,
    max_code_of,
    quantise_dense,
    quantise_sampled,
    quantise_threshold,
    quantise_topk,
    silent,
    unigram_spread,
)
from feddistill.payload.envelope import ENVELOPE_LIMIT, VERSION, Envelope, digest, seal
from feddistill.payload.ledger import Entry, parse_entries
from feddistill.payload.request import canonical, fingerprint, parse_spec, spec_digest
from feddistill.payload.shards import cut, digest_of, pieces, rows_of, shards

__all__ = [
    "ENVELOPE_LIMIT",
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
    "cut",
    "digest",
    "digest_of",
    "encode",
    "expand",
    "fingerprint",
    "joined",
    "max_code_of",
    "parse_entries",
    "parse_spec",
    "pieces",
    "quantise_dense",
    "quantise_sampled",
    "quantise_threshold",
    "quantise_topk",
    "read",
    "reread",
    "rows_of",
    "seal",
    "shards",
    "silent",
    "spec_digest",
    "unigram_spread",
]
