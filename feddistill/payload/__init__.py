"""Payload format v1: a client's answers as bytes that a server can check (``docs/payload.md``).

``quantise_*`` turn log-probabilities into answers, ``encode`` and ``seal`` write the payload and its
envelope, ``admit`` checks both and returns the answers or raises a ``Refusal``.
"""

from feddistill.payload.admission import admit, bound, encode, read, reread
from feddistill.payload.answers import (
    Answers,
    Dense,
    Ranked,
    Sampled,
    abstained,
    concatenate,
    expand,
    max_code_of,
    quantise_dense,
    quantise_sampled,
    quantise_threshold,
    quantise_topk,
    unigram_spread,
)
from feddistill.payload.envelope import ENVELOPE_LIMIT, VERSION, Envelope, digest, seal
from feddistill.payload.ledger import Entry, parse_entries
from feddistill.payload.request import canonical, fingerprint, parse_spec, spec_digest
from feddistill.payload.shards import digest_of, ranges, rows_of, shards, split

__all__ = [
    "ENVELOPE_LIMIT",
    "VERSION",
    "Answers",
    "Dense",
    "Entry",
    "Envelope",
    "Ranked",
    "Sampled",
    "abstained",
    "admit",
    "bound",
    "canonical",
    "concatenate",
    "digest",
    "digest_of",
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
    "ranges",
    "read",
    "reread",
    "rows_of",
    "seal",
    "shards",
    "spec_digest",
    "split",
    "unigram_spread",
]
