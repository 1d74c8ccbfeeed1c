"""What texts begin with: one decision for training, evaluation, projection and exports."""

import json
from itertools import pairwise

import hub_fixtures as hub
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from language_fixtures import LLAMA, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from feddistill.benchmarks.likelihood import continuation
from feddistill.cli import main
from feddistill.config import load, load_stored, parse
from feddistill.config.data import EmbeddedSource
from feddistill.data.sources import read
from feddistill.errors import ConfigError, ModelError
from feddistill.modelio.packing import pack
from feddistill.models import causal
from feddistill.models.tokenizers import TextBounds, begin_texts, text_bounds
from feddistill.runs import experiment, trained_models
from feddistill.tasks.translation import Side, Translation
from feddistill.types import TextSet
from feddistill_kernels import topk_compress

BOS, EOS, CLS = 0, 1, 2


@pytest.fixture(scope="module")
def backend():
    """A byte-level BPE with ``<bos>``, ``<eos>`` and ``<cls>``, as JSON."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>", "<cls>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(read(EmbeddedSource(), "texts").texts[:200], trainer)
    return made.to_str()


def tokenizer_with(backend, template=None, offsets=False, **tokens):
    made = Tokenizer.from_str(backend)
    parts = [processors.ByteLevel(trim_offsets=False)] if offsets else []
    if template is not None:
        special = [("<bos>", BOS), ("<eos>", EOS), ("<cls>", CLS)]
        parts.append(processors.TemplateProcessing(single=template, special_tokens=special))
    if parts:
        made.post_processor = processors.Sequence(parts) if len(parts) > 1 else parts[0]
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokens)


SAME = {"bos_token": "<eos>"}  # as GPT-2 and OPT have it
BERT = {"bos_token": None, "eos_token": None, "cls_token": "<cls>", "sep_token": "<eos>"}


@pytest.mark.parametrize(
    ("template", "tokens", "scratch", "setting", "bounds"),
    [
        ("<bos> $A", {}, False, "auto", (BOS, True)),  # Llama, Gemma
        ("<bos> $A <eos>", {}, False, "auto", (BOS, True)),
        ("<eos> $A", SAME, False, "auto", (EOS, True)),  # OPT
        ("<cls> $A <eos>", BERT, False, "auto", (CLS, True)),
        (None, {}, False, "auto", (EOS, False)),  # Bloom
        (None, {}, True, "auto", (BOS, True)),
        (None, SAME, True, "auto", (EOS, False)),  # GPT-2
        (None, {"bos_token": None}, True, "auto", (EOS, False)),
        ("$A <eos>", {"bos_token": None}, False, "auto", (EOS, False)),
        (None, SAME, False, "bos", (EOS, True)),
        (None, BERT, False, "bos", (CLS, True)),
        ("<bos> $A", {}, False, "eos", (EOS, False)),
        ("<bos> <cls> $A", {}, False, "eos", (EOS, False)),  # GLM
        ("<bos> $A", {}, True, "none", (None, False)),
    ],
)
@pytest.mark.parametrize("offsets", [False, True])
def test_what_texts_begin_with_is_decided_once_and_kept_by_an_export(
    backend, template, tokens, scratch, setting, bounds, offsets, tmp_path
):
    tokenizer = tokenizer_with(backend, template, offsets, **tokens)
    whole = tokenizer("some words").input_ids
    plain = tokenizer("some words", add_special_tokens=False).input_ids
    after = [EOS] if whole[-1] == EOS else []
    found = text_bounds(tokenizer, setting, "m", scratch=scratch)
    assert found == TextBounds(bounds[0], EOS, bounds[1])
    begin_texts(tokenizer, found)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    before = [bounds[0]] if bounds[1] else []
    for kept in (tokenizer, again):
        assert text_bounds(kept, "auto", "m") == found
        assert kept("some words").input_ids == [*before, *plain, *after]
        spans = kept("a b", return_offsets_mapping=True).offset_mapping
        usual = f"{'<bos> ' * len(before)}$A{' <eos>' * len(after)}"
        other = tokenizer_with(backend, usual, offsets)
        assert spans == other("a b", return_offsets_mapping=True).offset_mapping
        # Other software begins a text with the bos token, or else with the end token.
        assert kept.bos_token_id in (found.start, None)


def test_what_a_tokenizer_cannot_begin_texts_with_is_one_line(backend):
    with pytest.raises(ModelError, match=r"m: its tokenizer has no token for language\.text_start = bos"):
        text_bounds(tokenizer_with(backend, bos_token=None), "bos", "m")
    with pytest.raises(ModelError, match=r"puts 2 tokens before a text \(<bos> <cls>\)"):
        text_bounds(tokenizer_with(backend, "<bos> <cls> $A"), "auto", "m")


@pytest.mark.parametrize("length", [2, 3, 5, 64])
def test_every_block_and_text_begins_with_the_start_token_which_nobody_predicts(length):
    texts = [list(range(10 * t, 10 * t + size)) for t, size in ((1, 3), (2, 7), (3, 1), (4, 0), (5, 9))]
    blocks = pack(texts, end=0, length=length, begin=1)
    tokens = [blocks[b].tolist() for b in range(len(blocks))]
    assert all(block[0] == 1 and len(block) <= length for block in tokens)
    assert all(block[1] != 1 for block in tokens)  # not twice
    assert blocks.targets[blocks.loss_mask].tolist() == [token for text in texts for token in (*text, 0)]
    assert set(blocks.targets[~blocks.loss_mask]) <= {1}
    read = [(before, token) for block in tokens for before, token in pairwise(block)]
    assert {before for before, token in read if token in (10, 20, 30, 50)} == {1}
    assert [token for _, token in read] == blocks.targets.tolist()


def test_without_a_start_token_the_first_token_of_a_text_is_not_predicted():
    blocks = pack([[5, 6, 7], [8], []], end=0, length=3, predict_first=False)
    assert [blocks[b].tolist() for b in range(len(blocks))] == [[5, 6, 7], [7, 0, 8], [8, 0, 0]]
    assert blocks.targets[blocks.loss_mask].tolist() == [6, 7, 0, 0]
    assert len(pack([], end=0, length=3, predict_first=False)) == 0


def test_bytes_of_tokens_that_are_not_predicted_are_not_counted(backend):
    tokenizer = tokenizer_with(backend)
    texts = TextSet("t", ("0", "1"), ("éa words", "b"), np.zeros(2, np.int64), ())
    firsts = [tokenizer.decode(tokenizer(text).input_ids[:1]) for text in texts.texts]
    for start, size in (("none", 10 - sum(len(t.encode()) for t in ("é", firsts[1]))), ("bos", 10)):
        reader = causal.TextReader(tokenizer, text_bounds(tokenizer, start, "m"))
        assert reader.bytes(texts) == size


def of(folder, **language):
    """A run of one client and a scratch Llama, which have a tokenizer with a bos token."""
    source = {**LLAMA["source"], "tokenizer": {"kind": "hub", "name": str(folder)}}
    model = {**LLAMA, "source": source}
    made = settings("starts", [model], model, sizes=(4, 4, 2, 2), language=language, rounds=1, baselines=[])
    made["data"]["partition"] = {"kind": "iid", "clients": 1}
    return made


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_training_evaluation_and_export_begin_texts_alike(backend, setting, tmp_path):
    tokenizer_with(backend).save_pretrained(tmp_path / "tokenizer")
    experiment.run(parse(of(tmp_path / "tokenizer", text_start=setting)), tmp_path / "run")
    text = "The people of the union."
    (tmp_path / "one.txt").write_text(text)

    def figures(*arguments):
        done = CliRunner().invoke(main, ["evaluate", *map(str, arguments), "--json"])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    done = CliRunner().invoke(main, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")])
    assert done.exit_code == 0, done.stderr
    model, tokenizer = (a.from_pretrained(tmp_path / "export") for a in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([[*tokenizer(text).input_ids, EOS]])
    assert (ids[0, 0] == BOS) == (setting == "auto")
    assert model.generation_config.bos_token_id == model.config.bos_token_id == tokenizer.bos_token_id
    with torch.no_grad():
        nats = float(model(input_ids=ids, labels=ids).loss)
    own = figures(tmp_path / "run", "--texts", tmp_path / "one.txt")
    assert own["cross_entropy"] == pytest.approx(nats, abs=1e-5)
    size = len(text.encode()) - (0 if setting == "auto" else 1)
    assert own["bits_per_byte"] == pytest.approx(nats * (ids.shape[1] - 1) / np.log(2) / size, abs=1e-5)

    path = hub.wikitext(tmp_path / "data")
    of_run, of_export = (
        figures(place, "--benchmark", "wikitext-2", "--path", path, "--limit", 1)
        for place in (tmp_path / "run", tmp_path / "export")
    )
    assert of_run["perplexity"] == of_export["perplexity"]
    assert of_run["bits_per_byte"] == of_export["bits_per_byte"]
    student = trained_models.of_folder(tmp_path / "export")
    long = continuation(student, text * 9, " It")
    assert len(long.ids) == 48
    assert (long.ids[0] == BOS) == (setting == "auto")
    # A run that was started before there was the setting is read as it was trained.
    stored = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "old.yaml").write_text("".join(x for x in stored.splitlines(True) if "text_start" not in x))
    assert load_stored(tmp_path / "old.yaml").language.text_start == "eos"
    assert load(tmp_path / "old.yaml").language.text_start == "auto"


@pytest.mark.parametrize("own", ["bos", "eos", "none"])
@pytest.mark.parametrize("theirs", ["bos", "eos", "none"])
def test_answers_are_about_the_same_tokens_whatever_texts_begin_with(backend, own, theirs, tmp_path):
    torch.manual_seed(0)
    texts = TextSet("p", ("0", "1", "2"), ("We the people – a", "", "an end"), np.zeros(3, np.int64), ())
    tokenizer = tokenizer_with(backend)
    readers = [causal.TextReader(tokenizer, text_bounds(tokenizer, start, "m")) for start in (own, theirs)]
    client, student = (
        Side(reader, texts, reader.blocks(texts, length), "m")
        for reader, length in zip(readers, (5, 8), strict=True)
    )
    translation = Translation(client, student, tmp_path)
    rows = np.flatnonzero(student.blocks.loss_mask)
    needed = translation.client_rows(rows)
    wanted = set(zip(student.blocks.texts[rows + 1], student.blocks.targets[rows], strict=True))
    answered = set(zip(client.blocks.texts[needed + 1], client.blocks.targets[needed], strict=True))
    assert answered <= wanted
    if own != "none":
        assert len(needed) == len(rows)
    vocab = readers[0].vocab_size
    likely = 9.0 * torch.nn.functional.one_hot(torch.from_numpy(client.blocks.targets[needed]), vocab)
    predictions = topk_compress(likely, 8, id_order=False)
    (found,) = [list(translation.answers([predictions], needed, rows, 4))]
    best = torch.cat([part.ids[:, 0] for part in found]).numpy()
    known = torch.cat([part.log_probs[:, 0] for part in found]).numpy() > -1
    assert np.array_equal(best[known], student.blocks.targets[rows][known])
    assert known.sum() == len(needed)


def test_one_tokenizer_and_two_beginnings_need_projection_or_are_refused(tiny_causal, backend, tmp_path):
    """A pretrained client's tokenizer adds nothing; the student from scratch begins with its bos token."""
    tokenizer = tokenizer_with(backend)
    tokenizer.save_pretrained(tmp_path / "model")
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=48,
        **{k: v for k, v in LLAMA["source"]["settings"].items() if k != "max_position_embeddings"},
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    config = of(tmp_path / "model")
    config["clients"]["models"] = [
        {"source": {"kind": "hub", "name": str(tmp_path / "model")}, "max_tokens": 48}
    ]
    result = experiment.run(parse(config), tmp_path / "run")
    assert result["projection"]["1"]["client-0"]["answered"] == 1
    config["payload"] = {"codec": "sampled"}
    with pytest.raises(ConfigError, match=r"begin texts in different ways: set language\.text_start"):
        experiment.check(parse(config))
