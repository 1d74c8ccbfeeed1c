"""The payload format: exact, deterministic, and closed to everything else."""

import hashlib
import json
import re
import time
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import payload_fixtures
import pytest
import safetensors.numpy
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from payload_fixtures import GOLDEN, HOSTILE, NOW, SPECS, TEXTS, answers_to, equal, log_probs, reseal, sent

from feddistill import payload
from feddistill.cli.inspect import inspect
from feddistill.errors import ConfigError, DataError, PayloadError
from feddistill.payload import refusals
from feddistill.types import RoundSpec

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
    with pytest.raises(ValueError, match="row 1 is no distribution"):
        payload.quantise_dense(np.log(np.array([[0.5, 0.5], [0.5, 0.9]], np.float32)))
    for wrong in (np.nan, np.inf, 1000.0):
        with pytest.raises(ValueError, match="row 0 is no distribution"):
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


@settings(max_examples=2000, deadline=None)
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
    again = payload.encode(got, asked, "north")
    assert equal(admit(*reseal(again, asked), asked), got)
    assert np.isfinite(got.mass()).all()


@settings(max_examples=2000, deadline=None)
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
    _, content = payload_fixtures.with_metadata(key, value)()
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
