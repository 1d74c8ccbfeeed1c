"""Hostile payloads: one and more for each refusal, with what its message must say."""

import json
import pickle
import struct
from dataclasses import replace

import numpy as np
from payload_fixtures import (
    DEADLINE,
    KEYS,
    NOW,
    SPECS,
    TEXTS,
    answers_to,
    reseal,
    sent,
)

from feddistill import payload
from feddistill.payload import container, envelope, refusals, zstd
from feddistill.payload.admission import metadata_of
from feddistill.payload.codecs import tensors_of
from feddistill.payload.request import canonical_json


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


def packed(asked=SPECS["topk"], **tensors):
    """A payload of other tensors, otherwise honest; a compressed one compresses them."""
    honest = metadata_of(asked, "north", 0)
    found = {**tensors_of(answers_to(asked)), **tensors}
    if asked.compression == "zstd":
        found = {"zstd": zstd.compress(found)}
    return lambda: reseal(container.pack(found, honest), asked)


def changed(name, row, column, value, asked=SPECS["topk"]):
    array = tensors_of(answers_to(asked))[name].copy()
    array[(row, column) if array.ndim == 2 else row] = value
    return packed(asked, **{name: array})


def framed(frame, asked=SPECS["topk-zstd"]):
    """A compressed payload whose only tensor is ``frame``."""
    honest = metadata_of(asked, "north", 0)
    return lambda: reseal(container.pack({"zstd": np.frombuffer(frame, np.uint8)}, honest), asked)


def honest_frame(asked=SPECS["topk-zstd"]):
    return zstd.compress(tensors_of(answers_to(asked))).tobytes()


MAGIC = b"\x28\xb5\x2f\xfd"


def bomb(declared, blocks):
    """A frame of RLE blocks, four bytes for each 128 KiB: 32 KB are 1 GiB. 13 bytes where there are none."""
    last = [*[0] * (blocks - 1), 1] if blocks else []
    body = b"".join((2**17 << 3 | 1 << 1 | end).to_bytes(3, "little") + b"\x00" for end in last)
    if not blocks:  # one segment, eight bytes of content size
        return MAGIC + b"\xe0" + declared.to_bytes(8, "little")
    return MAGIC + b"\xc0\x68" + declared.to_bytes(8, "little") + body  # a window of 8 MiB


def swapped():
    """Two ids of the same value, the higher one first."""
    tensors = tensors_of(answers_to(SPECS["topk"]))
    idx, val = tensors["idx"].copy(), tensors["val"].copy()
    val[0, 1] = val[0, 0]
    idx[0, :2] = np.sort(idx[0, :2])[::-1]
    tail = tensors["tail"].copy()
    tail[0] = 255
    val[0] = np.array([8, 8, 250, 250], np.uint8)
    idx[0, 2:] = np.sort(idx[0, 2:])
    return packed(idx=idx, val=val, tail=tail)


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


def signed(**changes):
    """A signed round's payload with another envelope."""
    return lambda: reseal(sent(SPECS["topk-signed"])[1], SPECS["topk-signed"], **changes)


def forged():
    """Signed by another client, who is enrolled too, in this one's name."""
    asked = SPECS["topk-signed"]
    said = json.loads(sent(asked)[0])
    del said["signature"]
    return signed(signature=KEYS["south"].sign(envelope.DOMAIN + canonical_json(said)))()


def respelt_expiry():
    sealed, content = sent(SPECS["topk-signed"])
    return sealed.replace(str(DEADLINE).encode(), str(DEADLINE).encode() + b".5"), content


def backwards():
    """The tensors in another order, and nothing between them."""
    asked = SPECS["topk"]
    tensors, metadata = container.unpack(sent(asked)[1])
    header, body = {}, b""
    for name in sorted(tensors, reverse=True):
        start, raw_bytes = len(body), tensors[name].tobytes()
        body += raw_bytes
        code = {1: "U8", 2: "U16"}[tensors[name].itemsize]
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [start, len(body)]}
    text = canonical_json({"__metadata__": metadata, **header})
    text += b" " * (-len(text) % 8)
    return reseal(struct.pack("<Q", len(text)) + text + body, asked)


def longer():
    """A row that claims one more entry than the threshold leaves it: the first of its padding."""
    asked = SPECS["threshold"]
    tensors = tensors_of(answers_to(asked))
    row = int(np.flatnonzero(tensors["n"] < asked.k)[0])
    lengths, values, ids = tensors["n"].copy(), tensors["val"].copy(), tensors["idx"].copy()
    place = int(lengths[row])
    lengths[row] += 1
    values[row, place] = asked.max_code + 1
    return packed(asked, n=lengths, val=values, idx=ids)()


def turned():
    idx, cnt = (tensors_of(answers_to(SPECS["sampled"]))[name].copy() for name in ("idx", "cnt"))
    idx[0, -2:], cnt[0, -2:] = idx[0, -2:][::-1].copy(), cnt[0, -2:][::-1].copy()
    return packed(SPECS["sampled"], idx=idx, cnt=cnt)()


def doubled():
    idx = tensors_of(answers_to(SPECS["sampled"]))["idx"].copy()
    idx[0, -1] = idx[0, -2]
    return packed(SPECS["sampled"], idx=idx)()


def squared():
    frame = np.frombuffer(honest_frame(), np.uint8)[None]
    metadata = container.unpack(sent(SPECS["topk-zstd"])[1])[1]
    return reseal(container.pack({"zstd": frame}, metadata), SPECS["topk-zstd"])


def raw(content, asked):
    return lambda: reseal(content, asked)


T, D, Z = SPECS["topk"], SPECS["dense"], SPECS["topk-zstd"]
R, W, S = SPECS["threshold"], SPECS["sampled"], SPECS["topk-signed"]
SIZE = TEXTS * 13
"""Bytes in the frame of ``Z``."""
LARGE = replace(Z, positions=2_000_000)
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
        "duplicate key 'nonce'",
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
    "duplicate key": (T, lambda: with_header(T, duplicate), refusals.MalformedHeader, "duplicate key 'tail'"),
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
    "wrong order": (
        T,
        changed("val", 3, 3, 0),
        refusals.NotInOrder,
        "in rank order, got another order in row 3",
    ),
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
        "duplicate key 'client'",
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
    **{
        f"client {name!r}": (
            T,
            lambda name=name: reseal(sent(T)[1], T, client=name),
            refusals.UnknownClient,
            "letters, digits",
        )
        for name in (
            "",
            ".",
            "..",
            "a/b",
            "/etc/passwd",
            "a\\b",
            "C:",
            "north\x00",
            "north ",
            "n\u00f6rd",
            "~",
        )
    },
    "client not enrolled": (
        T,
        lambda: reseal(sent(T)[1], T, client="east"),
        refusals.UnknownClient,
        "enrolled",
    ),
    "another run": (T, lambda: reseal(sent(T)[1], T, run="x"), refusals.WrongRun, "envelope, run"),
    "an old round": (T, lambda: sent(replace(T, round=2)), refusals.WrongRound, "must be 3, got 2"),
    "a replay": (T, lambda: sent(replace(T, nonce="00")), refusals.WrongNonce, "nonce"),
    "answers to other texts": (
        T,
        lambda: sent(replace(T, proxy_digest="00")),
        refusals.WrongQuestion,
        "spec",
    ),
    "header respelt": (T, lambda: with_header(T, json.dumps), refusals.NotCanonical, "canonical JSON"),
    "tensors in another order": (T, backwards, refusals.NotCanonical, "canonical JSON"),
    "an archive": (T, raw(b"PK\x03\x04" + bytes(60), T), refusals.HeaderTooLarge, "16384"),
    "envelope a pickle": (
        T,
        lambda: (pickle.dumps({"client": "north"}), sent(T)[1]),
        refusals.MalformedEnvelope,
        "JSON",
    ),
    "equal values out of order": (T, swapped(), refusals.NotInOrder, "ascending where values are equal"),
    "tail of nothing": (
        SPECS["topk-whole"],
        changed("tail", 2, 0, 200, SPECS["topk-whole"]),
        refusals.WrongPadding,
        "255 where every id is kept, got 200 in row 2",
    ),
    "row of no length": (R, changed("n", 1, 0, 0, R), refusals.WrongLength, "from 1 to 9, got 0 in row 1"),
    "row too long": (R, changed("n", 1, 0, 10, R), refusals.WrongLength, "from 1 to 9, got 10"),
    "row longer than it is": (R, longer, refusals.BelowThreshold, "at most 40"),
    "padding another id": (R, changed("idx", 0, 8, 999, R), refusals.WrongPadding, "lowest other ids"),
    "padding another value": (R, changed("val", 0, 8, 254, R), refusals.WrongPadding, "code 255"),
    "draws missing": (W, changed("cnt", 3, 19, 0, W), refusals.WrongPadding, "nothing was drawn"),
    "draws too many": (W, changed("cnt", 3, 0, 99, W), refusals.WrongDraws, "must be 20, got"),
    "draws out of order": (W, turned, refusals.NotInOrder, "ascending"),
    "draws of one id twice": (W, doubled, refusals.IdRepeated, "a repetition in row 0"),
    "draws out of range": (W, changed("idx", 1, 19, 1000, W), refusals.IdOutOfRange, "below 1000"),
    "bomb of 13 bytes": (Z, framed(bomb(2**62, 0)), refusals.WrongContentSize, f"{SIZE} bytes"),
    "bomb of 13 bytes, its size disguised": (
        Z,
        framed(bomb(SIZE, 0)),
        refusals.MalformedFrame,
        "whole blocks",
    ),
    "bomb of 32 KB": (
        LARGE,
        framed(bomb(2**30, 2**13), LARGE),
        refusals.WrongContentSize,
        f"{13 * 2_000_000} bytes, got {2**30}",
    ),
    "bomb of 32 KB, its size disguised": (
        LARGE,
        framed(bomb(13 * 2_000_000, 2**13), LARGE),
        refusals.WrongContentSize,
        "26000000 bytes, got more",
    ),
    "bomb of too few blocks": (
        LARGE,
        framed(bomb(13 * 2_000_000, 2), LARGE),
        refusals.WrongContentSize,
        "blocks of at most 262144",
    ),
    "frame of many blocks": (
        Z,
        framed(MAGIC + b"\x20\x41" + b"\x00\x00\x00" * 200 + b"\x01\x00\x00"),
        refusals.MalformedFrame,
        "at most 64 blocks",
    ),
    "frame of no size": (
        Z,
        framed(MAGIC + b"\x00\x58" + honest_frame()[6:]),
        refusals.WrongContentSize,
        "no declaration",
    ),
    "frame of another size": (
        Z,
        framed(zstd.compress({"idx": np.zeros(40, np.uint8)}).tobytes()),
        refusals.WrongContentSize,
        f"{SIZE} bytes, got 40",
    ),
    "frame with a dictionary": (
        Z,
        framed(MAGIC + b"\x21" + honest_frame()[5:]),
        refusals.MalformedFrame,
        "without dictionary",
    ),
    "frame with a checksum": (
        Z,
        framed(MAGIC + b"\x24" + honest_frame()[5:] + bytes(4)),
        refusals.MalformedFrame,
        "checksum",
    ),
    "frame of a large window": (
        LARGE,
        framed(MAGIC + b"\x80\x70" + (13 * 2_000_000).to_bytes(4, "little") + b"\x01\x00\x00", LARGE),
        refusals.MalformedFrame,
        "a window of at most",
    ),
    "frame twice": (Z, framed(honest_frame() * 2), refusals.MalformedFrame, "nothing behind it"),
    "frame with a rest": (Z, framed(honest_frame() + b"\x00"), refusals.MalformedFrame, "1 bytes more"),
    "frame after one to skip": (
        Z,
        framed(b"\x50\x2a\x4d\x18" + bytes(4) + honest_frame()),
        refusals.MalformedFrame,
        "begins with 28 b5 2f fd",
    ),
    "frame cut": (Z, framed(honest_frame()[:-2]), refusals.MalformedFrame, "zstd frame"),
    "frame of one byte": (Z, framed(b"\x28"), refusals.MalformedFrame, "begins with"),
    "frame of a reserved block": (
        Z,
        framed(MAGIC + b"\x20\x41" + b"\x07\x00\x00"),
        refusals.MalformedFrame,
        "kind 3",
    ),
    "frame of nonsense": (
        Z,
        framed(MAGIC + b"\x20\x41" + (8 << 3 | 2 << 1 | 1).to_bytes(3, "little") + b"\xff" * 8),
        refusals.MalformedFrame,
        "what a compressor wrote",
    ),
    "frame of two dimensions": (Z, squared, refusals.WrongShape, "uint8 [bytes], got uint8 [1, "),
    "not compressed": (
        Z,
        lambda: reseal(container.pack(tensors_of(answers_to(Z)), container.unpack(sent(Z)[1])[1]), Z),
        refusals.WrongTensors,
        "['zstd']",
    ),
    "not compressed, and says so": (
        Z,
        lambda: reseal(sent(T)[1], Z),
        refusals.WrongMetadata,
        "compression must be zstd, got none",
    ),
    "id out of range, compressed": (Z, changed("idx", 1, 1, 1000, Z), refusals.IdOutOfRange, "below 1000"),
    "wrong order, compressed": (Z, changed("val", 3, 3, 0, Z), refusals.NotInOrder, "row 3"),
    "signature missing": (S, signed(signature=None), refusals.MissingSignature, "got null"),
    "signature of another": (S, forged, refusals.BadSignature, "made with the key"),
    "signature of other bytes": (
        S,
        lambda: (sent(S)[0].replace(b'"size":', b'"size":1'), sent(S)[1]),
        refusals.BadSignature,
        "made with the key",
    ),
    "signature no hexadecimal": (S, signed(signature="x" * 128), refusals.BadSignature, "hexadecimal"),
    "signature short": (S, signed(signature="00"), refusals.BadSignature, "128"),
    "signature a number": (S, signed(signature=1), refusals.MalformedEnvelope, "object of"),
    "signature that nobody checks": (
        T,
        lambda: reseal(sent(T)[1], T, signature="00" * 64),
        refusals.BadSignature,
        "enrolled no keys",
    ),
    "client without a key": (
        replace(S, clients=("north", "south", "east")),
        lambda: reseal(sent(S)[1], S, client="east"),
        refusals.UnknownClient,
        "key must be enrolled",
    ),
    "expired": (S, signed(expires=NOW - 1), refusals.Expired, f"{NOW} or later, got {NOW - 1}"),
    "never expires": (S, signed(expires=None), refusals.MalformedEnvelope, "a time, got None"),
    "expires in a round without an end": (
        T,
        lambda: reseal(sent(T)[1], T, expires=NOW + 1),
        refusals.MalformedEnvelope,
        "no deadline",
    ),
    "expires a float": (S, lambda: respelt_expiry(), refusals.MalformedEnvelope, ".5 is not an integer"),
    "another shard": (T, lambda: reseal(sent(T)[1], T, sequence=1), refusals.MalformedEnvelope, "sequence"),
}
