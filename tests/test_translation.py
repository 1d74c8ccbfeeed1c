"""Runs in which clients have other tokenizers than the student."""

from pathlib import Path

import language_fixtures
import numpy as np
import pytest
import torch
from language_fixtures import GPT2, LLAMA, TOKENIZER, outcome, tiny
from safetensors.numpy import load

from feddistill import payload
from feddistill.aggregation.answers import answered, first_choice
from feddistill.client.client import ClientGroup
from feddistill.config import parse
from feddistill.config.models import TrainedTokenizer
from feddistill.errors import ConfigError, ModelError
from feddistill.federation import encoding
from feddistill.models import causal
from feddistill.models.tokenizers import text_bounds, tokenizer_of
from feddistill.progress import NoProgress
from feddistill.runs import experiment
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.session import Session
from feddistill.tasks.translation import Counts, Side, by_edit_distance, by_spans, overlapping, translate
from feddistill.training.blocks import NO_TEACHER
from feddistill.types import TextSet
from feddistill_kernels import TopK, topk_compress

OTHER = {
    **LLAMA,
    "source": {**LLAMA["source"], "tokenizer": {"kind": "trained", "vocab_size": 340}},
    "max_tokens": 40,
}


class Said(NoProgress):
    def __init__(self):
        self.lines = []

    def log(self, line):
        self.lines.append(line)


def of_two_tokenizers(**changes):
    """The second and the fourth client read in other pieces than the student, and in shorter blocks."""
    clients = {
        "models": [GPT2, OTHER],
        "training": language_fixtures.TRAINING,
        "eval_batch_size": 16,
        "evaluate": False,
    }
    return parse(tiny(clients=clients, baselines=[], **changes))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    out, said = tmp_path_factory.mktemp("mixed") / "run", Said()
    return {"out": out, "result": experiment.run(of_two_tokenizers(), out, progress=said), "said": said.lines}


def uploads_of(out):
    files = sorted(out.glob("rounds/*/payloads/*.safetensors"))
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def test_who_speaks_in_other_tokens_answers_in_the_students(mixed):
    result, out = mixed["result"], mixed["out"]
    everyone = sorted(file.stem for file in out.glob("rounds/001/payloads/*.json"))
    assert set(result["projection"]) == {"1", "2"}
    for number, told in result["projection"].items():
        spec = payload.parse_spec((out / f"rounds/00{number}/spec.json").read_bytes())
        assert len(told) == 2
        for name in everyone:
            envelope, content = (
                (out / f"rounds/00{number}/payloads/{name}{end}").read_bytes()
                for end in (".json", ".safetensors")
            )
            rows = encoding.topk(payload.admit(envelope, content, spec, set()))
            share = float(answered(rows).double().mean())
            if name not in told:
                assert share == 1
                continue
            assert 0.5 < told[name]["coverage"] < 1
            assert told[name]["answered"] == pytest.approx(share, abs=1e-6)
            assert told[name]["rows"] == spec.positions
            assert told[name]["seconds"] > 0
    lines = [line for line in mixed["said"] if "another tokenizer" in line]
    assert sorted(line.split()[0] for line in lines) == sorted(result["projection"]["1"]), "once each"
    assert result["metrics"]["student"]["bits_per_byte"] < 8


def test_edit_distances_instead_of_spans_are_another_run(mixed, tmp_path):
    result = experiment.run(of_two_tokenizers(rounds=1, language={"alignment": "mined"}), tmp_path / "run")
    (told,) = result["projection"].values()
    spans = mixed["result"]["projection"]["1"]
    assert set(told) == set(spans)
    # A token that FedMKT finds no partner for says the text itself; the end of a text is not answered.
    assert all(told[name]["answered"] != spans[name]["answered"] for name in told)
    assert all(0.5 < told[name]["answered"] < 1 for name in told)
    mined, other = (
        {Path(name).stem: load(said)["idx"] for name, said in uploads_of(out).items() if "/001/" in name}
        for out in (tmp_path / "run", mixed["out"])
    )
    assert {name for name in mined if not np.array_equal(mined[name], other[name])} == set(told)


def test_who_speaks_in_other_tokens_learns_from_the_teacher(mixed):
    config = of_two_tokenizers()
    directory = RunDirectory.open(mixed["out"])
    try:
        session = Session(config, experiment.check(config, build=False), directory, NoProgress())
        spec = payload.parse_spec(directory.read_bytes("rounds/001/spec.json"))
        client = next(c for c in ClientGroup(session).clients if c.name in mixed["result"]["projection"]["1"])
        given, own = client._lessons(2, spec), client.learner.examples(client.private)
    finally:
        directory.close()
    rows = given.teacher_rows[len(own.labels) :]
    blocks = client.learner.blocks(session.splits.proxy)
    assert given.teacher_rows[: len(own.labels)].eq(NO_TEACHER).all()
    assert len(rows) == blocks.rows
    assert torch.equal(given.labels[len(own.labels) :], torch.from_numpy(blocks.targets))
    taught = rows[rows != NO_TEACHER]
    assert 0.5 < len(taught) / len(rows) <= 1
    assert given.teacher.vocab_size == 340
    assert answered(given.teacher).all()
    assert (mass_of(given.teacher) - 1).abs().max() < 1e-5


def test_a_run_of_two_tokenizers_resumes_to_the_same_payloads(mixed, tmp_path, monkeypatch):
    original, calls = encoding.compress_parts, []

    def failing(*args):
        found = original(*args)
        calls.append(found)
        if len(calls) == 7:  # in round 2: four clients and the teacher have answered in round 1
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "compress_parts", failing)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(of_two_tokenizers(), tmp_path / "run")
    assert (tmp_path / "run/records/rounds/001/student.json").exists()
    again = experiment.run(of_two_tokenizers(), tmp_path / "run", resume=True)
    assert outcome(again) == outcome(mixed["result"])
    assert uploads_of(tmp_path / "run") == uploads_of(mixed["out"])


def mass_of(rows):
    return rows.log_probs.double().exp().sum(1) + rows.log_tail.double().exp()


def side_of(size, texts, length):
    tokenizer = tokenizer_of(TrainedTokenizer(vocab_size=size), "s", texts.texts)
    reader = causal.TextReader(tokenizer, text_bounds(tokenizer, "auto", "s"))
    return Side(reader, texts, reader.blocks(texts, length), "s")


def public_texts():
    said = ("We the people, of 1789 – «façade»", "a", "", "people and the union of the people\n\nagain")
    return TextSet("p", ("0", "1", "2", "3"), said, np.zeros(4, np.int64), (), None)


@pytest.mark.parametrize("step", [1, 3])
def test_projected_answers_of_the_same_tokenizer_are_the_direct_ones(step, tmp_path):
    torch.manual_seed(0)
    mine, theirs = (side_of(280, public_texts(), length) for length in (5, 9))
    rows = np.arange(theirs.blocks.rows)[step - 1 :: step]
    way = by_spans(theirs.vocabulary, mine.vocabulary, tmp_path)
    assert np.array_equal(overlapping(rows, mine, theirs), rows)
    logits, tally = torch.randn(len(rows), 280) * 4, Counts()
    pieces = [topk_compress(part, 64, id_order=False) for part in logits.split(4)]
    found = TopK.cat(list(translate(pieces, rows, rows, theirs, mine, way, 5, tally)))
    wanted = topk_compress(logits, 5, id_order=False)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.log_tail, wanted.log_tail, rtol=1e-4, atol=1e-5)
    assert (tally.rows, tally.answered) == (len(rows), len(rows))


def a_way(alignment, sender, receiver, folder):
    if alignment == "mined":
        return by_edit_distance(sender.vocabulary, receiver.vocabulary)
    return by_spans(sender.vocabulary, receiver.vocabulary, folder)


@pytest.mark.parametrize("alignment", ["spans", "mined"])
@pytest.mark.parametrize("step", [1, 3])
def test_what_is_projected_is_a_distribution(step, alignment, tmp_path):
    torch.manual_seed(0)
    mine, theirs = side_of(270, public_texts(), 9), side_of(290, public_texts(), 5)
    asked = np.arange(mine.blocks.rows)[step - 1 :: step]
    rows, tally = overlapping(asked, mine, theirs), Counts()
    assert len(rows) <= theirs.blocks.rows
    assert (len(rows) == theirs.blocks.rows) == (step == 1)
    way = a_way(alignment, theirs, mine, tmp_path)
    logits = 6 * torch.nn.functional.one_hot(torch.from_numpy(theirs.blocks.targets[rows]), 290).float()
    said = topk_compress(logits + torch.rand(len(rows), 290), 64, id_order=False)
    pieces = [said[a : a + 2] for a in range(0, len(rows), 2)]
    found = TopK.cat(list(translate(pieces, rows, asked, theirs, mine, way, 5, tally)))
    good = answered(found)
    assert len(found) == len(asked) == tally.rows
    assert (mass_of(found) - 1).abs().max() < 1e-6
    assert 0 < tally.record()["coverage"] < 1
    assert tally.answered == int(good.sum()) > len(asked) / 2
    right = first_choice(found) == torch.from_numpy(mine.blocks.targets[asked])
    assert right[good].double().mean() > 0.9, "who knows the text knows it in other tokens too"


def test_who_cannot_be_projected_is_refused():
    with pytest.raises(ConfigError, match=r"'sampled' cannot mark .* tokenizer of clients\.models\.1 is not"):
        experiment.check(of_two_tokenizers(payload={"codec": "sampled"}))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    source = {"kind": "scratch", "architecture": "bert", "tokenizer": TOKENIZER, "settings": small}
    masked = {"source": source, "max_tokens": 48}
    with pytest.raises(ModelError, match=r"clients\.models\.1: a masked language model sees what follows"):
        experiment.check(
            parse(tiny(clients={"models": [GPT2, masked], "training": language_fixtures.TRAINING}))
        )
