"""Honest payloads and golden files; the hostile ones are in ``hostile_fixtures.py``."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from feddistill import payload
from feddistill.payload import envelope, keys
from feddistill.payload.codecs import tensors_of
from feddistill.payload.request import canonical_json
from feddistill.types import RoundSpec

GOLDEN = Path(__file__).parent / "golden"
TEXTS = 5
NOW, DEADLINE = 1_800_000_000, 1_800_003_600
KEYS = {name: keys.PrivateKey(bytes([number]) * 32) for number, name in enumerate(("north", "south", "east"))}


def spec(codec, vocab_size, k, **more):
    return RoundSpec(
        run_id="0123456789abcdef",
        round=3,
        proxy_digest="ab" * 16,
        positions=TEXTS,
        vocab_size=vocab_size,
        vocab_fingerprint=payload.fingerprint([str(i) for i in range(7)]),
        codec=codec,
        k=k,
        nonce="00c0ffee",
        quorum=2,
        clients=("north", "south"),
        **more,
    )


ENROLLED = {
    "deadline": DEADLINE,
    "previous": "5a" * 32,
    "keys": tuple((name, KEYS[name].public) for name in ("north", "south")),
}
PLAIN = {
    "dense": spec("dense", 7, 7),
    "topk": spec("topk", 1000, 4),
    "threshold": spec("threshold", 1000, 9, max_code=40),
    "sampled": spec("sampled", 1000, 20, draws=20),
}
SPECS = {
    **PLAIN,
    **{f"{name}-zstd": replace(plain, compression="zstd") for name, plain in PLAIN.items()},
    **{f"{name}-signed": replace(plain, **ENROLLED) for name, plain in PLAIN.items()},
    "topk-wide": spec("topk", 100_000, 4),
    "topk-wide-zstd-signed": spec("topk", 100_000, 4, compression="zstd", **ENROLLED),
    "topk-whole": spec("topk", 7, 7),
    "threshold-whole": spec("threshold", 7, 7, max_code=60),
    "sampled-whole": spec("sampled", 7, 7, draws=20),
}


def log_probs(vocab_size, texts=TEXTS):
    logits = 3 * np.random.default_rng(0).normal(size=(texts, vocab_size))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


@cache
def answers_to(asked):
    full = log_probs(asked.vocab_size, asked.positions)
    if asked.codec == "dense":
        return payload.quantise_dense(full)
    if asked.codec == "sampled":
        return drawn(asked, full)
    ids = np.argsort(-full, axis=1, kind="stable")[:, : asked.k].astype(np.int32)
    kept = np.take_along_axis(full, ids, 1)
    rest = np.exp(full.astype(np.float64)).sum(1) - np.exp(kept.astype(np.float64)).sum(1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(rest, 0)).astype(np.float32)
    if asked.codec == "threshold":
        return payload.quantise_threshold(ids, kept, tail, asked.vocab_size, asked.max_code)
    return payload.quantise_topk(ids, kept, tail, asked.vocab_size)


def drawn(asked, full):
    random = np.random.default_rng(1)
    counts = np.stack([random.multinomial(asked.draws, row / row.sum()) for row in np.exp(np.float64(full))])
    # Those that were drawn, and the lowest others: the order that a stable sort leaves.
    ids = np.argsort(counts == 0, axis=1, kind="stable")[:, : asked.k]
    with np.errstate(divide="ignore"):
        log_q = np.log(np.take_along_axis(counts, ids, 1) / asked.draws)
    return payload.quantise_sampled(
        ids.astype(np.int32), log_q.astype(np.float32), asked.draws, asked.vocab_size
    )


def sent(asked, client="north"):
    content = payload.encode(answers_to(asked), asked, client)
    return payload.seal(content, asked, client, key=KEYS[client] if asked.keys else None), content


def write_golden():
    """Makes the committed files anew: only for a new version of the format."""
    for name, asked in SPECS.items():
        sealed, content = sent(asked)
        (GOLDEN / f"{name}.json").write_bytes(sealed)
        (GOLDEN / f"{name}.safetensors").write_bytes(content)


def equal(a, b):
    one, other = tensors_of(a), tensors_of(b)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def reseal(content, asked, client="north", **changes):
    """An envelope for ``content``, with other fields, signed again if the round wants it."""
    said = json.loads(payload.seal(content, replace(asked, keys=()), "north")) | {"client": client} | changes
    if asked.keys and "signature" not in changes:
        unsigned = {name: value for name, value in said.items() if name != "signature"}
        said["signature"] = KEYS[client if client in ("south", "east") else "north"].sign(
            envelope.DOMAIN + canonical_json(unsigned)
        )
    return canonical_json(said), content
