"""Honest payloads, golden files and hostile ones, for ``test_payload.py``."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from feddistill import payload
from feddistill.payload import container, refusals
from feddistill.payload.request import canonical_json
from feddistill.types import RoundSpec

GOLDEN = Path(__file__).parent / "golden"
TEXTS = 5


def spec(codec, vocab_size, k):
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
    )


SPECS = {
    "dense": spec("dense", 7, 7),
    "topk": spec("topk", 1000, 4),
    "topk-wide": spec("topk", 100_000, 4),
    "topk-whole": spec("topk", 7, 7),
}


def log_probs(vocab_size, texts=TEXTS):
    logits = 3 * np.random.default_rng(0).normal(size=(texts, vocab_size))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def answers_to(asked):
    full = log_probs(asked.vocab_size, asked.positions)
    if asked.codec == "dense":
        return payload.quantise_dense(full)
    ids = np.argsort(-full, axis=1, kind="stable")[:, : asked.k].astype(np.int32)
    kept = np.take_along_axis(full, ids, 1)
    rest = np.exp(full.astype(np.float64)).sum(1) - np.exp(kept.astype(np.float64)).sum(1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(rest, 0)).astype(np.float32)
    return payload.quantise_topk(ids, kept, tail, asked.vocab_size)


def sent(asked, client="north"):
    content = payload.encode(answers_to(asked), asked, client)
    return payload.seal(content, asked, client), content


def write_golden():
    """Makes the committed files anew: only for a new version of the format."""
    for name, asked in SPECS.items():
        envelope, content = sent(asked)
        (GOLDEN / f"{name}.json").write_bytes(envelope)
        (GOLDEN / f"{name}.safetensors").write_bytes(content)


def equal(a, b):
    if isinstance(a, payload.Dense):
        return np.array_equal(a.codes, b.codes)
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("ids", "codes", "tail"))


def reseal(content, asked, client="north", **changes):
    envelope = json.loads(payload.seal(content, asked, client))
    return canonical_json({**envelope, **changes}), content


def with_header(asked, edit):
    """The payload with its header edited, sealed anew: a liar who knows the format."""
    content = payload.encode(answers_to(asked), asked, "north")
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    edited = edit(header)
    raw = (edited if isinstance(edited, str) else json.dumps(edited)).encode()
    return reseal(struct.pack("<Q", len(raw)) + raw + content[8 + size :], asked)


def with_metadata(key, value):
    def edit(header):
        header["__metadata__"][key] = value
        return header

    return lambda: with_header(SPECS["dense"], edit)


def with_tensor(name, **changes):
    def edit(header):
        header[name] = {**header[name], **changes}
        return header

    return lambda: with_header(SPECS["topk"], edit)


def packed(**tensors):
    """A top-k payload of other tensors, otherwise honest."""
    asked = SPECS["topk"]
    honest = container.unpack(payload.encode(answers_to(asked), asked, "north"))
    return lambda: reseal(container.pack({**honest[0], **tensors}, honest[1]), asked)


def changed(name, row, column, value):
    array = container.unpack(payload.encode(answers_to(SPECS["topk"]), SPECS["topk"], "north"))[0][
        name
    ].copy()
    array[row, column] = value
    return packed(**{name: array})


def duplicate(header):
    return json.dumps(header).replace(
        '"tail":', '"tail":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},"tail":'
    )


def respell(old, new):
    """The sealed payload's envelope with other bytes that mean, or may mean, the same."""

    def make():
        envelope, content = sent(SPECS["topk"])
        assert old in envelope
        return envelope.replace(old, new), content

    return make


def reheader(old, new):
    """A top-k payload with another text in its header, sealed anew."""
    return lambda: with_header(SPECS["topk"], lambda header: json.dumps(header).replace(old, new))


def long_request():
    """A round so large that a header of many megabytes is within its bound."""
    return replace(SPECS["topk"], positions=2_000_000)


def many(header):
    entries = ",".join(f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}' for i in range(200_000))
    return "{" + entries + "}"


def raw(content, asked):
    return lambda: reseal(content, asked)


T, D = SPECS["topk"], SPECS["dense"]
HOSTILE = {
    "over the bound": (T, raw(b"x" * 20_000, T), refusals.TooLarge, "at most"),
    "empty": (T, raw(b"", T), refusals.Truncated, "at least 8 bytes"),
    "a pickle": (T, raw(b"\x80\x04\x95" + b"." * 40, T), refusals.HeaderTooLarge, "16384"),
    "cut short": (T, lambda: reseal(sent(T)[1][:-3], T), refusals.Truncated, "bytes up to"),
    "cut after sealing": (T, lambda: (sent(T)[0], sent(T)[1][:-3]), refusals.Truncated, "payload"),
    "extended": (T, lambda: reseal(sent(T)[1] + b"xx", T), refusals.ExtraBytes, "file"),
    "extended after sealing": (T, lambda: (sent(T)[0], sent(T)[1] + b"x"), refusals.ExtraBytes, "payload"),
    "another file": (
        T,
        lambda: (sent(T)[0], sent(T)[1][:-1] + b"\x00"),
        refusals.DigestMismatch,
        "blake2b",
    ),
    "200 k tensors": (T, lambda: with_header(T, many), refusals.TooLarge, "at most"),
    "header no JSON": (T, lambda: with_header(T, lambda h: "{{"), refusals.MalformedHeader, "JSON"),
    "200 k tensors in a large round": (
        long_request(),
        lambda: reseal(with_header(T, many)[1], long_request()),
        refusals.HeaderTooLarge,
        "16384",
    ),
    "header after a space": (T, lambda: with_header(T, lambda h: " {}"), refusals.MalformedHeader, "space"),
    "header no UTF-8": (
        T,
        lambda: reseal(struct.pack("<Q", 7) + b'{"\xff":1}', T),
        refusals.MalformedHeader,
        "utf-8",
    ),
    "header of a huge integer": (
        T,
        lambda: with_header(T, lambda h: '{"a":' + "9" * 9000 + "}"),
        refusals.MalformedHeader,
        "JSON",
    ),
    "header with Infinity": (
        T,
        lambda: with_header(T, lambda h: '{"a":-Infinity}'),
        refusals.MalformedHeader,
        "Infinity",
    ),
    "metadata key duplicate": (
        T,
        reheader('"nonce":', '"nonce": "00", "nonce":'),
        refusals.MalformedHeader,
        "'nonce' stands twice",
    ),
    "metadata a surrogate": (T, reheader("00c0ffee", "\\ud800"), refusals.WrongNonce, "ud800"),
    "metadata missing": (
        T,
        reheader('"step": "1/12", ', ""),
        refusals.WrongMetadata,
        "missing ['step']",
    ),
    "header a list": (T, lambda: with_header(T, lambda h: "[]"), refusals.MalformedHeader, "list"),
    "header deep": (T, lambda: with_header(T, lambda h: "[" * 9000), refusals.MalformedHeader, "JSON"),
    "header with NaN": (T, lambda: with_header(T, lambda h: '{"a":NaN}'), refusals.MalformedHeader, "NaN"),
    "duplicate key": (T, lambda: with_header(T, duplicate), refusals.MalformedHeader, "'tail' stands twice"),
    "no metadata": (
        T,
        lambda: with_header(T, lambda h: {k: v for k, v in h.items() if k != "__metadata__"}),
        refusals.MalformedHeader,
        "__metadata__",
    ),
    "metadata a number": (D, with_metadata("k", 7), refusals.MalformedHeader, "__metadata__"),
    "metadata unknown": (D, with_metadata("more", "1"), refusals.WrongMetadata, "unknown ['more']"),
    "wrong version": (D, with_metadata("version", "2"), refusals.WrongMetadata, "version must be 1, got 2"),
    "wrong codec": (D, with_metadata("codec", "topk"), refusals.WrongMetadata, "codec must be dense"),
    "wrong step": (D, with_metadata("step", "1/8"), refusals.WrongMetadata, "step"),
    "wrong tokenizer": (D, with_metadata("vocab_fingerprint", "00"), refusals.WrongVocabulary, "vocab"),
    "wrong proxy set": (D, with_metadata("spec", "00"), refusals.WrongQuestion, "spec"),
    "wrong run inside": (D, with_metadata("run", "x"), refusals.WrongRun, "run"),
    "wrong round inside": (D, with_metadata("round", "2"), refusals.WrongRound, "round must be 3, got 2"),
    "wrong nonce": (D, with_metadata("nonce", "00"), refusals.WrongNonce, "nonce"),
    "wrong client inside": (
        D,
        with_metadata("client", "south"),
        refusals.WrongMetadata,
        "client must be north",
    ),
    "tensor missing": (
        T,
        lambda: reseal(container.pack({"tail": np.zeros(5, np.uint8)}, container.unpack(sent(T)[1])[1]), T),
        refusals.WrongTensors,
        "['idx', 'tail', 'val']",
    ),
    "tensor unknown": (T, packed(more=np.ones(1, np.uint8)), refusals.WrongTensors, "more"),
    "tensor aliased": (
        T,
        with_tensor("val", data_offsets=[0, 20]),
        refusals.WrongTensors,
        "data_offsets",
    ),
    "tensor overlapping": (T, with_tensor("tail", data_offsets=[39, 44]), refusals.WrongTensors, "from 40"),
    "tensor after a gap": (T, with_tensor("tail", data_offsets=[41, 46]), refusals.WrongTensors, "from 40"),
    "tensor backwards": (T, with_tensor("tail", data_offsets=[40, 35]), refusals.WrongTensors, "bytes"),
    "tensor of a long name": (T, reheader('"idx"', f'"{"x" * 5000}"'), refusals.WrongTensors, "xxx..."),
    "tensor of no name": (T, reheader('"idx"', '"\\ud800\\u202e\\n"'), refusals.WrongTensors, "ud800"),
    "tensor no object": (T, reheader('"idx": {', '"idx": 1, "more": {'), refusals.MalformedHeader, "idx"),
    "tensor empty": (T, with_tensor("tail", shape=[0]), refusals.WrongTensors, "not empty"),
    "tensor of floats": (T, with_tensor("val", dtype="F32"), refusals.WrongShape, "U8 or U16, got F32"),
    "tensor of three sizes": (
        T,
        with_tensor("val", shape=[5, 2, 2]),
        refusals.WrongShape,
        "one or two sizes",
    ),
    "tensor of huge size": (T, with_tensor("val", shape=[2**60, 4]), refusals.WrongShape, "one or two sizes"),
    "tensor of negative size": (T, with_tensor("val", shape=[-5, -4]), refusals.WrongShape, "sizes"),
    "tensor size a bool": (T, with_tensor("tail", shape=[True]), refusals.WrongShape, "sizes"),
    "tensor size a float": (T, with_tensor("tail", shape=[5.0]), refusals.MalformedHeader, "not an integer"),
    "offset negative": (
        T,
        with_tensor("idx", data_offsets=[-1, 39]),
        refusals.MalformedHeader,
        "two offsets",
    ),
    "tensor fields unknown": (T, with_tensor("idx", more=1), refusals.MalformedHeader, "dtype, shape"),
    "wrong rows": (T, packed(tail=np.zeros(4, np.uint8)), refusals.WrongShape, "uint8 [5], got uint8 [4]"),
    "wrong dtype": (T, packed(val=np.zeros((5, 4), np.uint16)), refusals.WrongShape, "got uint16"),
    "id out of range": (T, changed("idx", 1, 1, 1000), refusals.IdOutOfRange, "below 1000, got 1000"),
    "id repeated": (
        T,
        changed("idx", 2, 3, int(answers_to(T).ids[2, 0])),
        refusals.IdRepeated,
        "a repetition in row 2",
    ),
    "wrong order": (T, changed("val", 3, 3, 0), refusals.NotInOrder, "row 3 is not"),
    "wrong mass, dense": (
        D,
        lambda: reseal(
            container.pack({"dense": np.full((5, 7), 255, np.uint8)}, container.unpack(sent(D)[1])[1]), D
        ),
        refusals.WrongMass,
        "0.000 in row 0",
    ),
    "wrong mass": (T, packed(tail=np.zeros(5, np.uint8)), refusals.WrongMass, "[0.9, 1.1]"),
    "envelope no JSON": (T, lambda: (b"{", sent(T)[1]), refusals.MalformedEnvelope, "JSON"),
    "envelope too large": (T, lambda: (b" " * 5000, sent(T)[1]), refusals.MalformedEnvelope, "4096"),
    "envelope with more": (T, lambda: reseal(sent(T)[1], T, more=1), refusals.MalformedEnvelope, "object of"),
    "envelope round a string": (
        T,
        lambda: reseal(sent(T)[1], T, round="3"),
        refusals.MalformedEnvelope,
        "of",
    ),
    "envelope size a bool": (T, lambda: reseal(sent(T)[1], T, size=True), refusals.MalformedEnvelope, "of"),
    "envelope empty": (T, lambda: (b"", sent(T)[1]), refusals.MalformedEnvelope, "JSON"),
    "envelope deep": (T, lambda: (b'{"a":' + b"[" * 4000, b""), refusals.MalformedEnvelope, "JSON"),
    "envelope nested": (
        T,
        lambda: (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", b""),
        refusals.MalformedEnvelope,
        "object of",
    ),
    "envelope spaced": (T, respell(b":", b": "), refusals.MalformedEnvelope, "canonical JSON"),
    "envelope respelt": (T, respell(b"north", b"\\u006eorth"), refusals.MalformedEnvelope, "canonical"),
    "envelope key duplicate": (
        T,
        respell(b'"client":', b'"client":"south","client":'),
        refusals.MalformedEnvelope,
        "'client' stands twice",
    ),
    "envelope round a float": (T, respell(b'"round":3', b'"round":3.0'), refusals.MalformedEnvelope, "3.0"),
    "envelope size negative": (T, lambda: reseal(sent(T)[1], T, size=-1), refusals.ExtraBytes, "-1 bytes"),
    "envelope of another version": (
        T,
        lambda: reseal(sent(T)[1], T, version="2"),
        refusals.MalformedEnvelope,
        "version must be 1, got 2",
    ),
    "client of a long name": (
        T,
        lambda: reseal(sent(T)[1], T, client="n" * 65),
        refusals.UnknownClient,
        "1 to 64",
    ),
    "client of no name": (
        T,
        lambda: reseal(sent(T)[1], T, client="../x\n"),
        refusals.UnknownClient,
        "letters",
    ),
    "client not enrolled": (
        T,
        lambda: reseal(sent(T)[1], T, client="east"),
        refusals.UnknownClient,
        "enrolled",
    ),
    "another run": (T, lambda: reseal(sent(T)[1], T, run="x"), refusals.WrongRun, "envelope, run"),
    "an old round": (T, lambda: sent(replace(T, round=2)), refusals.WrongRound, "must be 3, got 2"),
    "a replay": (T, lambda: sent(replace(T, nonce="00")), refusals.WrongQuestion, "spec"),
    "another shard": (T, lambda: reseal(sent(T)[1], T, sequence=1), refusals.MalformedEnvelope, "sequence"),
}
