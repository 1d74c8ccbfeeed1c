"""The payload format: exact, deterministic, and closed to everything else."""

import hashlib
import json
import re
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from feddistill import payload
from feddistill.errors import PayloadError
from feddistill.payload import container, refusals
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


def equal(a, b):
    if isinstance(a, payload.Dense):
        return np.array_equal(a.codes, b.codes)
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("ids", "codes", "tail"))


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def asked(request):
    return request.param


def test_what_is_sent_arrives(asked):
    assert equal(payload.admit(*sent(asked), asked, set()), answers_to(asked))


def test_bytes_are_golden(asked, request):
    name = request.node.callspec.id
    for suffix, content in zip((".json", ".safetensors"), sent(asked), strict=True):
        assert (GOLDEN / f"{name}{suffix}").read_bytes() == content


def test_the_file_is_safetensors(asked):
    tensors = safetensors.numpy.load(sent(asked)[1])
    assert all(t.dtype in (np.uint8, np.uint16) for t in tensors.values())


def test_a_dense_answer_is_right_to_a_twenty_fourth_of_a_nat():
    full = log_probs(7)
    got = payload.quantise_dense(full).log_probs()
    assert np.abs(got - full).max() < 1 / 24 + 0.05  # rounding, and the norm that it moves
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(1), 1, rtol=1e-6)


def test_a_top_k_answer_keeps_its_mass():
    got = answers_to(SPECS["topk"])
    kept, tail = got.log_probs()
    np.testing.assert_allclose(np.exp(kept).sum(1) + np.exp(tail), 1, rtol=1e-5)
    _, whole = answers_to(SPECS["topk-whole"]).log_probs()
    assert np.isneginf(whole).all(), "where every class is kept there is no tail"


def test_equal_bytes_are_in_the_order_of_their_ids():
    ids = np.array([[5, 2, 9]], np.int32)
    even = np.log(np.full((1, 3), 0.3, np.float32))
    got = payload.quantise_topk(ids, even, np.log(np.array([0.1], np.float32)), 1000)
    assert got.ids.tolist() == [[2, 5, 9]]


def test_what_is_no_distribution_is_our_own_bug():
    with pytest.raises(ValueError, match="row 1 is no distribution"):
        payload.quantise_dense(np.log(np.array([[0.5, 0.5], [0.5, 0.9]], np.float32)))
    with pytest.raises(ValueError, match="row 0 is no distribution"):
        payload.quantise_dense(np.full((1, 2), np.nan, np.float32))


def reseal(content, asked, client="north", **changes):
    envelope = json.loads(payload.seal(content, asked, client))
    return json.dumps({**envelope, **changes}).encode(), content


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


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_payloads_are_refused_by_name(case):
    asked, make, refusal, text = HOSTILE[case]
    envelope, content = make()
    start = time.perf_counter()
    with pytest.raises(PayloadError) as caught:
        payload.admit(envelope, content, asked, set())
    assert time.perf_counter() - start < 1
    assert type(caught.value) is refusal, caught.value
    assert text in str(caught.value)
    assert "round 3" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_every_refusal_has_a_hostile_file():
    every = {c for c in vars(refusals).values() if isinstance(c, type) and issubclass(c, refusals.Refusal)}
    tested = {refusal for _, _, refusal, _ in HOSTILE.values()} | {
        refusals.SecondSubmission,
        refusals.Refusal,
    }
    assert tested == every


def test_a_second_submission_is_refused(asked):
    with pytest.raises(refusals.SecondSubmission, match="north, round 3"):
        payload.admit(*sent(asked), asked, {("north", 3)})


def test_honest_payloads_are_within_the_bound(asked):
    assert len(sent(asked)[1]) <= payload.bound(asked)


@settings(max_examples=1000, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(-8, 8),
)
def test_mutations_are_refused_or_equal(name, edits, cut):
    asked = SPECS[name]
    content = bytearray(sent(asked)[1])
    for place, value in edits:
        content[place % len(content)] = value
    mutated = bytes(content[:cut]) if cut < 0 else bytes(content) + b"\x00" * cut
    try:
        got = payload.admit(*reseal(mutated, asked), asked, set())
    except PayloadError:
        return
    again = payload.encode(got, asked, "north")
    assert equal(payload.admit(*reseal(again, asked), asked, set()), got)
    assert np.isfinite(got.mass()).all()


def test_the_decoder_in_the_specification_agrees(asked):
    page = (Path(__file__).parents[1] / "docs" / "payload.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    space = {}
    exec(code, space)
    rows = space["decode"](sent(asked)[1])
    got = payload.admit(*sent(asked), asked, set())
    for row in range(TEXTS):
        if asked.codec == "dense":
            expected = dict(enumerate(got.log_probs()[row].tolist()))
        else:
            expected = dict(zip(got.ids[row].tolist(), got.log_probs()[0][row].tolist(), strict=True))
        kept, tail = rows[row]
        assert kept == pytest.approx(expected, abs=1e-5)
        if asked.codec == "topk" and asked.k < asked.vocab_size:
            assert tail == pytest.approx(got.log_probs()[1][row], abs=1e-5)


def test_reading_needs_no_request(asked):
    answers, metadata = payload.read(sent(asked)[1])
    assert equal(answers, answers_to(asked))
    assert metadata["client"] == "north"
    assert metadata["spec"] == payload.spec_digest(asked)


def test_the_envelope_vouches_for_the_bytes(asked):
    envelope, content = sent(asked)
    assert json.loads(envelope)["blake2b"] == hashlib.blake2b(content, digest_size=32).hexdigest()
