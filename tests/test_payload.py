"""The payload format: exact, deterministic, and closed to everything else."""

import hashlib
import json
import mmap
import os
import re
import subprocess
import sys
import time
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import payload_fixtures
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner
from fuzz_payload import fuzz
from hostile_fixtures import HOSTILE, with_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from payload_fixtures import (
    DEADLINE,
    GOLDEN,
    KEYS,
    NOW,
    SPECS,
    TEXTS,
    answers_to,
    equal,
    log_probs,
    reseal,
    sent,
)

from feddistill import payload
from feddistill.cli.inspect import inspect
from feddistill.errors import ConfigError, DataError, PayloadError
from feddistill.payload import refusals
from feddistill.types import RoundSpec
from feddistill_kernels import topk_sample

REFUSALS = {
    kind
    for kind in vars(refusals).values()
    if isinstance(kind, type) and issubclass(kind, refusals.Refusal) and kind is not refusals.Refusal
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def asked(request):
    return request.param


def admit(envelope, content, asked, seen=frozenset()):
    return payload.admit(envelope, content, asked, seen, now=NOW)


def test_what_is_sent_arrives(asked):
    assert equal(admit(*sent(asked), asked), answers_to(asked))


def test_bytes_are_golden(tmp_path, monkeypatch):
    monkeypatch.setattr(payload_fixtures, "GOLDEN", tmp_path)
    payload_fixtures.write_golden()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {
        f.name: f.read_bytes() for f in GOLDEN.iterdir()
    }


def test_the_file_is_safetensors(asked):
    tensors = safetensors.numpy.load(sent(asked)[1])
    assert all(t.dtype in (np.uint8, np.uint16) for t in tensors.values())


def test_an_answer_is_right_to_a_twenty_fourth_of_a_nat():
    full = log_probs(7, 1000)
    answer = payload.quantise_dense(full)
    assert np.abs(answer.codes / -12 - full).max() <= 1 / 24 + 1e-6
    got = answer.log_probs()
    assert np.abs(got - full).max() <= 2 / 24 + 1e-6  # rounding, and the norm that it moves
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


def test_the_impossible_is_as_unlikely_as_a_byte_can_say():
    certain = np.array([[0, -np.inf, -np.inf]], np.float32)
    assert payload.quantise_dense(certain).codes.tolist() == [[0, 255, 255]]
    got = payload.quantise_topk(np.array([[4]]), certain[:, :1], certain[:, 1], 1000)
    assert got.tail.tolist() == [255]


def test_any_order_in_is_rank_order_out():
    ids = np.array([[3, 1, 2]], np.int32)
    mixed = np.log(np.array([[0.1, 0.5, 0.3]], np.float32))
    got = payload.quantise_topk(ids, mixed, np.log(np.array([0.1], np.float32)), 1000)
    assert got.ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0, 7]], "within 0..6, got 0..7"), ([[-1, 0]], "within 0..6, got -1..0"), ([[3, 3]], "distinct")],
)
def test_wrong_ids_are_our_own_bug(ids, message):
    half = np.log(np.full((1, 2), 0.5, np.float32))
    with pytest.raises(ValueError, match=message):
        payload.quantise_topk(np.array(ids, np.int32), half, np.full(1, -np.inf, np.float32), 7)


def test_answers_to_another_request_are_our_own_bug(asked):
    with pytest.raises(ValueError, match="answers must be"):
        payload.encode(answers_to(asked), replace(asked, positions=TEXTS + 1), "north")


def test_what_is_no_distribution_is_our_own_bug():
    with pytest.raises(ValueError, match="row 1 is not a distribution"):
        payload.quantise_dense(np.log(np.array([[0.5, 0.5], [0.5, 0.9]], np.float32)))
    for wrong in (np.nan, np.inf, 1000.0):
        with pytest.raises(ValueError, match="row 0 is not a distribution"):
            payload.quantise_dense(np.full((1, 2), wrong, np.float32))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_payloads_are_refused_by_name(case):
    asked, make, refusal, text = HOSTILE[case]
    envelope, content = make()
    start = time.perf_counter()
    with pytest.raises(PayloadError) as caught:
        admit(envelope, content, asked)
    assert time.perf_counter() - start < 1
    assert type(caught.value) is refusal, caught.value
    assert text in str(caught.value)
    assert "round 3" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_every_refusal_has_a_hostile_file():
    tested = {refusal for _, _, refusal, _ in HOSTILE.values()}
    assert tested | {refusals.SecondSubmission} == REFUSALS


def test_a_second_submission_is_refused(asked):
    with pytest.raises(refusals.SecondSubmission, match="north, round 3"):
        admit(*sent(asked), asked, {("north", 3)})


def test_honest_payloads_are_within_the_bound(asked):
    assert len(sent(asked)[1]) <= payload.bound(asked)


@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(-8, 8),
)
def test_mutations_are_refused_or_equal(name, edits, cut):
    asked = SPECS[name]
    content = bytearray((GOLDEN / f"{name}.safetensors").read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    mutated = bytes(content[:cut]) if cut < 0 else bytes(content) + b"\x00" * cut
    try:
        got = admit(*reseal(mutated, asked), asked)
    except PayloadError:
        return
    safetensors.numpy.load(mutated)  # what is admitted, the library can read too
    if asked.compression == "none":
        assert payload.encode(got, asked, "north") == mutated
    again = payload.encode(got, asked, "north")
    assert equal(admit(*reseal(again, asked), asked), got)
    assert np.isfinite(got.mass()).all()


@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    part=st.sampled_from((".json", ".safetensors")),
    place=st.integers(0, 2000),
    value=st.integers(0, 255),
)
def test_what_changes_on_the_way_is_refused_or_equal(name, part, place, value):
    files = {
        suffix: bytearray((GOLDEN / f"{name}{suffix}").read_bytes()) for suffix in (".json", ".safetensors")
    }
    files[part][place % len(files[part])] = value
    try:
        got = admit(bytes(files[".json"]), bytes(files[".safetensors"]), SPECS[name])
    except PayloadError:
        return
    assert equal(got, answers_to(SPECS[name]))


def test_checks_take_little_more_memory_than_the_answers():
    asked = replace(SPECS["topk"], positions=1_000_000)
    ids = np.tile(np.arange(4, dtype=np.int32), (1_000_000, 1))
    codes = np.full((1_000_000, 4), 24, np.uint8)
    answers = payload.Ranked(ids, codes, np.full(1_000_000, 9, np.uint8), 1000)
    content = payload.encode(answers, asked, "north")
    envelope = payload.seal(content, asked, "north")
    tracemalloc.start()
    try:
        payload.admit(envelope, content, asked, set())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < ids.nbytes + 40 * 2**20  # the ids of the answer, and blocks of the checks


BOMBS = """
import resource, sys
from hostile_fixtures import HOSTILE
from payload_fixtures import NOW
from feddistill import payload

asked, make, refusal, _ = HOSTILE[sys.argv[1]]
files = make()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
try:
    payload.admit(*files, asked, frozenset(), now=NOW)
except refusal:
    print(peak() - before, payload.bound(asked))
"""


@pytest.mark.parametrize("case", [name for name in HOSTILE if "bomb" in name or "window" in name])
def test_bombs_take_no_memory(case):
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, case],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    grown, bound = map(int, done.stdout.split())
    assert grown < 2 * bound + 8 * 2**20  # zstd's own window


def test_compressed_answers_take_little_more_memory_than_they_are():
    asked = replace(SPECS["topk-zstd"], positions=1_000_000)
    ids = np.tile(np.arange(4, dtype=np.uint16), (1_000_000, 1))
    answers = payload.Ranked(
        ids, np.full((1_000_000, 4), 24, np.uint8), np.full(1_000_000, 9, np.uint8), 1000
    )
    content = payload.encode(answers, asked, "north")
    sealed = payload.seal(content, asked, "north")
    tracemalloc.start()
    try:
        got = payload.admit(sealed, content, asked, set())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert equal(got, answers)
    assert peak < 13_000_000 + 20 * 2**20


def test_bytes_are_the_same_in_another_process_with_other_threads(tmp_path):
    script = (
        "import hashlib, torch; torch.set_num_threads(3)\n"
        "from payload_fixtures import SPECS, sent\n"
        "print(hashlib.blake2b(b''.join(b''.join(sent(SPECS[n])) for n in SPECS)).hexdigest())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env, cwd=tmp_path
    )
    here = hashlib.blake2b(b"".join(b"".join(sent(SPECS[name])) for name in SPECS)).hexdigest()
    assert done.stdout.strip() == here


def test_mapped_files_are_read_in_place(tmp_path):
    envelope, content = sent(SPECS["topk"])
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    got = admit(envelope, memoryview(mapped), SPECS["topk"])
    assert equal(got, answers_to(SPECS["topk"]))
    assert not got.codes.flags.owndata


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("name", ["topk", "threshold", "topk-whole", "threshold-whole"])
def test_a_missing_id_has_its_share_of_the_tail(name, spread):
    asked = SPECS[name]
    answers = answers_to(asked)
    counts = np.random.default_rng(0).integers(0, 100, asked.vocab_size)
    weights = payload.unigram_spread(counts) if spread else np.ones(asked.vocab_size)
    got = payload.expand(answers, weights if spread else None)
    np.testing.assert_allclose(np.exp(got, dtype=np.float64).sum(1), 1, rtol=1e-5)
    for row in range(TEXTS):  # the textbook way
        length = asked.k if answers.lengths is None else int(answers.lengths[row])
        entries = zip(answers.ids[row].tolist(), answers.codes[row].tolist(), strict=True)
        kept = {i: np.exp(-code / 12) for i, code in entries}
        kept = dict(list(kept.items())[:length])
        tail = np.exp(-int(answers.tail[row]) / 12) if length < asked.vocab_size else 0.0
        others = [i for i in range(asked.vocab_size) if i not in kept]
        expected = {i: tail * weights[i] / sum(weights[j] for j in others) for i in others} | kept
        norm = sum(kept.values()) + tail
        expected = [np.log(expected[i] / norm) for i in range(asked.vocab_size)]
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


def test_a_threshold_keeps_what_is_likely_enough():
    asked = SPECS["threshold"]
    answers = answers_to(asked)
    assert 1 < answers.lengths.min() < answers.lengths.max() < asked.k
    kept = answers.kept()
    assert (answers.codes[kept] <= asked.max_code).all()
    np.testing.assert_allclose(answers.mass(), 1, atol=0.05)
    flat = np.log(np.full((1, 50), 0.02, np.float32))
    one = payload.quantise_threshold(np.arange(50, dtype=np.int32)[None], flat, flat[:, 0] - 20, 100, 1)
    assert one.lengths.tolist() == [1], "the likeliest stays"


def test_equal_shares_are_what_readers_of_k_ids_see():
    answers = answers_to(SPECS["threshold"])
    kept, tail = answers.log_probs()
    dense = np.repeat((tail - np.log(answers.vocab_size - answers.k))[:, None], answers.vocab_size, 1)
    np.put_along_axis(dense, answers.ids.astype(np.int64), kept, 1)
    np.testing.assert_allclose(dense, payload.expand(answers), atol=1e-5)


def test_draws_are_right_on_average():
    full = torch.from_numpy(log_probs(30, 2))
    random = torch.Generator().manual_seed(0)
    total = np.zeros((2, 30))
    for _ in range(300):
        drawn = topk_sample(full, 50, generator=random)
        answers = payload.quantise_sampled(drawn.ids.numpy(), drawn.log_probs.numpy(), 50, 30)
        total += np.exp(payload.expand(answers))
    np.testing.assert_allclose(total / 300, full.exp().numpy(), atol=0.02)


@pytest.mark.parametrize(
    ("ids", "q", "draws", "message"),
    [
        ([[0, 1]], [[0.5, 0.25]], 4, "row 0 has 3 draws, not 4"),
        ([[0, 1]], [[0.5, 0.3]], 4, "counts must be integers of at most 4"),
        ([[0, 1]], [[0.5, 0.5]], 256, "draws at most 255"),
        ([[0, 9]], [[1.0, 0.0]], 4, "must be the lowest ones"),
    ],
)
def test_wrong_draws_are_our_own_bug(ids, q, draws, message):
    with np.errstate(divide="ignore"):
        log_q = np.log(np.array(q, np.float32))
    with pytest.raises(ValueError, match=message):
        payload.quantise_sampled(np.array(ids, np.int32), log_q, draws, 100)


def test_only_the_enrolled_key_seals():
    asked = SPECS["topk-signed"]
    with pytest.raises(ValueError, match="the round enrolled key"):
        payload.seal(b"", asked, "north", key=KEYS["south"])
    with pytest.raises(ValueError, match="the round enrolled key"):
        payload.seal(b"", asked, "north")
    with pytest.raises(ValueError, match="a round with a deadline"):
        payload.seal(b"", SPECS["topk"], "north", expires=1)
    with pytest.raises(ValueError, match="needs the time"):
        payload.admit(*sent(asked), asked, frozenset())


def test_an_answer_may_be_used_until_it_expires():
    asked = SPECS["topk-signed"]
    content = payload.encode(answers_to(asked), asked, "north")
    late = payload.seal(content, asked, "north", key=KEYS["north"], expires=DEADLINE + 60)
    assert equal(payload.admit(late, content, asked, frozenset(), now=DEADLINE + 60), answers_to(asked))
    with pytest.raises(refusals.Expired):
        payload.admit(late, content, asked, frozenset(), now=DEADLINE + 61)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "zip"}, "codec must be one of dense, topk, threshold, sampled, got 'zip'"),
        ({"compression": "gzip"}, "compression must be one of none, zstd"),
        ({"k": 1001}, "k must be from 1 to vocab_size"),
        ({"positions": 0}, "positions must be from 1"),
        ({"codec": "sampled", "draws": 300, "k": 300}, "draws must be from 1 to 255"),
        ({"codec": "sampled", "draws": 5}, "k must be the lesser of draws and vocab_size"),
        ({"max_code": 256}, "max_code must be from 0 to 255"),
        ({"keys": (("north", "00"),)}, "the key of 'north' must be 64 hexadecimal digits"),
        ({"keys": (("north", "0" * 64), ("north", "1" * 64))}, "each client once"),
    ],
)
def test_a_request_that_nobody_could_answer_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        payload.parse_spec(payload.canonical(replace(SPECS["topk"], **change)))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"pip install 'feddistill\[protocol\]'"):
        sent(SPECS["topk-zstd"])


def test_mutated_payloads_are_refused_or_what_they_say(fuzz_seed):
    tally = fuzz(3000, fuzz_seed)
    assert tally.accepted > 100
    assert len(tally.refused) > 20


def test_the_decoder_in_the_specification_agrees(asked):
    page = (Path(__file__).parents[1] / "docs" / "payload.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    space = {}
    exec(code, space)
    rows = space["decode"](sent(asked)[1])
    got = admit(*sent(asked), asked)
    dense = np.full((TEXTS, asked.vocab_size), -np.inf)
    for row, (kept, tail) in enumerate(rows):
        others = asked.vocab_size - len(kept)
        dense[row] = tail - np.log(others) if others else -np.inf
        dense[row, list(kept)] = list(kept.values())
    np.testing.assert_allclose(payload.expand(got), dense, atol=1e-5)


def test_reading_needs_no_request(asked):
    answers, metadata = payload.read(sent(asked)[1])
    assert equal(answers, answers_to(asked))
    assert metadata["client"] == "north"
    assert metadata["spec"] == payload.spec_digest(asked)


@pytest.mark.parametrize(
    ("key", "value", "refusal"),
    [
        ("codec", "zip", refusals.WrongMetadata),
        ("version", "2", refusals.WrongMetadata),
        ("k", "8", refusals.WrongMetadata),
        ("k", "-7", refusals.WrongMetadata),
        ("tokens", "6", refusals.WrongShape),
        ("client", "../x", refusals.UnknownClient),
    ],
)
def test_reading_refuses_what_no_request_could_ask(key, value, refusal):
    _, content = with_metadata(key, value)()
    with pytest.raises(PayloadError) as caught:
        payload.read(content)
    assert type(caught.value) is refusal, caught.value


def test_a_request_arrives_as_it_was_sent(asked):
    assert payload.parse_spec(payload.canonical(asked)) == asked


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: b"{", "not the JSON of a request"),
        (lambda raw: raw.replace(b'"round":3', b'"round":"3"'), "'round': Input should be a valid integer"),
        (lambda raw: raw.replace(b'"k":', b'"l":'), "'k': Field required"),
        (lambda raw: raw.replace(b'{"clients"', b'{"a":1,"clients"'), "canonical JSON"),
        (lambda raw: raw.replace(b",", b", "), "canonical JSON"),
    ],
)
def test_another_request_is_refused(edit, message):
    with pytest.raises(DataError, match=message):
        payload.parse_spec(edit(payload.canonical(SPECS["topk"])))


def inspected(*arguments):
    return CliRunner().invoke(inspect, [str(argument) for argument in arguments], catch_exceptions=True)


def test_the_page_names_every_field():
    page = (Path(__file__).parents[1] / "docs" / "payload.md").read_text()
    names = {field.name for kind in (RoundSpec, payload.Envelope) for field in fields(kind)}
    names |= {name for asked in SPECS.values() for name in payload.read(sent(asked)[1])[1]}
    names |= {refusal.__name__ for refusal in REFUSALS}
    assert not {name for name in names if f"`{name}`" not in page}


def test_inspect_shows_what_a_file_says(asked, request):
    shown = inspected(GOLDEN / f"{request.node.callspec.id}.safetensors", "--rows", 1)
    assert shown.exit_code == 0, shown.exception
    assert all(text in shown.output for text in ("well-formed", "north", asked.nonce, "answer 0: "))
    assert "answer 1" not in shown.output


def test_inspect_makes_every_check_of_the_round(tmp_path):
    request, other = tmp_path / "spec.json", tmp_path / "other.json"
    request.write_bytes(payload.canonical(SPECS["topk"]))
    other.write_bytes(payload.canonical(replace(SPECS["topk"], round=4)))
    file = GOLDEN / "topk.safetensors"
    shown = inspected(file, "--spec", request)
    assert "answers round 3 of run '0123456789abcdef'" in shown.output, shown.exception
    assert isinstance(inspected(file, "--spec", other).exception, refusals.WrongRound)
    wrong = inspected(file, "--spec", request, "--envelope", GOLDEN / "dense.json").exception
    assert isinstance(wrong, PayloadError)
    assert isinstance(inspected(file, "--envelope", request).exception, ConfigError)
    assert isinstance(inspected(tmp_path / "absent").exception, DataError)


def test_the_envelope_vouches_for_the_bytes(asked):
    envelope, content = sent(asked)
    assert json.loads(envelope)["blake2b"] == hashlib.blake2b(content, digest_size=32).hexdigest()
