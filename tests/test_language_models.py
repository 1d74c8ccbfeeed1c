"""Causal language models: blocks, the loss, who has an opinion, and a whole run of tiny models."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from language_fixtures import LLAMA, TOKENIZER, outcome, tiny
from safetensors.torch import load_file
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from feddistill import payload
from feddistill.aggregation.answers import answered
from feddistill.config import dump, parse
from feddistill.config.models import ModelConfig, TrainedTokenizer
from feddistill.config.training import DistillConfig
from feddistill.errors import ConfigError, ModelError
from feddistill.federation import encoding
from feddistill.metrics import language
from feddistill.modelio.outputs import head_of, hidden_states
from feddistill.modelio.packing import pack
from feddistill.models import causal
from feddistill.models.tokenizers import fingerprint, tokenizer_of
from feddistill.report import studies
from feddistill.runs import experiment, plan, study
from feddistill.store.logit_files import TopKFile
from feddistill.training.blocks import (
    NO_TEACHER,
    block_loss,
    concatenate,
    examples_of,
    repeated,
    rows_of,
    select,
    with_hard_targets,
)
from feddistill.types import NO_LABEL, RoundSpec, TextSet
from feddistill_kernels import TopK, topk_compress


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("lm") / "run"
    return {"out": out, "result": experiment.run(parse(tiny()), out)}


def test_every_token_is_predicted_once_by_the_tokens_before_it():
    texts = [list(range(10 * t, 10 * t + size)) for t, size in ((1, 3), (2, 7), (3, 1), (4, 0), (5, 9))]
    blocks = pack(texts, end=0, length=5)
    stream = [0] + [token for text in texts for token in (*text, 0)]
    seen = []
    for b in range(len(blocks)):
        tokens = blocks[b].tolist()
        assert len(tokens) == 5 or b == len(blocks) - 1
        for place in range(len(tokens) - 1):
            row = blocks.first(b) + place
            assert blocks.targets[row] == tokens[place + 1]
            assert stream[row] == tokens[place]
            seen.append(row)
    assert seen == list(range(blocks.rows)) == list(range(len(stream) - 1))
    assert [blocks.texts[r + 1] for r in range(4)] == [0, 0, 0, 0]


def test_tokens_of_a_prompt_are_not_learned():
    config = parse(tiny(language={"completion_only": True}))
    tokenizer = tokenizer_of(config.student.model.source, "s", ["some words and other words"])
    reader = causal.reader_of(tokenizer, config.student.model, config.language, "s")
    texts = TextSet("t", ("0", "1"), ("Q: é? A: no", "ab"), np.zeros(2, np.int64), (), None, (5, 0))
    blocks = reader.blocks(texts, 8)
    said = [blocks.targets[(blocks.texts[1:] == t) & blocks.loss_mask] for t in (0, 1)]
    assert [reader.tokenizer.decode(part, skip_special_tokens=True) for part in said] == [" A: no", "ab"]
    assert reader.bytes(texts) == len(" A: no") + 2


def test_bits_per_byte_by_hand(finished):
    assert language(8 * math.log(2), 4, 2).bits_per_byte == pytest.approx(4)
    figures = finished["result"]["metrics"]["student"]
    assert figures["perplexity"] == pytest.approx(math.exp(figures["cross_entropy"]), rel=1e-4)
    config = parse(tiny())
    splits = experiment.check(config, build=False)
    model = causal.build(config.student.model, 0, "student.model", splits.proxy.texts)
    from feddistill import models

    best = finished["out"] / finished["result"]["student_weights"]
    models.restore(model.model, best)
    model.model.eval()
    blocks, total = model.reader.blocks(splits.test, 48), 0.0
    for b in range(len(blocks)):
        ids = torch.from_numpy(blocks[b])[None]
        with torch.no_grad():
            logits = model.model(input_ids=ids).logits[0, :-1]
        total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    size = sum(len(text.encode()) for text in splits.test.texts)
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_is_that_of_dense_autograd(tied, kind):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=37, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    blocks = pack([list(range(1, 20)), [5, 6, 7]], end=0, length=9)
    asked = torch.arange(1, blocks.rows, 2)
    teacher = topk_compress(torch.randn(len(asked), 37), 37)  # all are kept: the same as a dense one
    given = examples_of(blocks, teacher, asked)
    distill = DistillConfig(kind=kind, temperature=1.0, kd_weight=0.3)
    ids = torch.zeros(len(blocks), 9, dtype=torch.long)
    for b in range(len(blocks)):
        ids[b, : len(blocks[b])] = torch.from_numpy(blocks[b])
    places, rows = rows_of(given, range(len(blocks)), 9)
    answers = given.teacher_rows[rows]
    taught = answers != NO_TEACHER
    labels = given.labels[rows].clone()
    labels[:2] = NO_LABEL  # of the two the second has a teacher, and counts
    hidden = hidden_states(model, ids).flatten(0, 1)[places]
    ours = block_loss(hidden, *head_of(model), labels, teacher[answers[taught]], taught, distill, 37)
    ours.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    log_p = model(input_ids=ids).logits.flatten(0, 1)[places].log_softmax(-1)
    ce = functional.nll_loss(log_p, labels, ignore_index=NO_LABEL, reduction="none")
    weight = torch.where(labels[taught] == NO_LABEL, 1.0, 0.3)
    q, p = teacher.expand()[answers[taught]], log_p[taught]
    middle = torch.logaddexp(q, p) - math.log(2)
    divergence = {
        "forward_kl": (q.exp() * (q - p)).sum(-1),
        "reverse_kl": (p.exp() * (p - q)).sum(-1),
        "jsd": 0.5 * (q.exp() * (q - middle) + p.exp() * (p - middle)).sum(-1),
    }[kind]
    learned = (weight * divergence + (1 - weight) * ce[taught]).sum()
    dense = ce[~taught].sum() + learned
    dense.backward()
    assert ours.item() == pytest.approx(dense.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6)


def test_examples_are_cut_joined_and_given_hard_targets():
    blocks = pack([list(range(1, 12))], end=0, length=5)
    asked = torch.tensor([1, 5, 9])
    ids = torch.tensor([[30, 31], [32, 33], [0, 1]], dtype=torch.int32)
    log_probs = torch.tensor([[0.2, 0.7], [0.6, 0.3], [0.0, 0.0]]).log()
    teacher = TopK(ids, log_probs, torch.tensor([0.1, 0.1, 1.0]).log(), 40)
    given = examples_of(blocks, teacher, asked)
    hard = with_hard_targets(given)
    assert hard.labels[1] == 31
    assert hard.labels[5] == 32
    assert hard.labels[9] == given.labels[9], "where the teacher has no opinion the label stays"
    picked = select(given, [2, 0])
    assert picked.labels.tolist() == [*given.labels[8:].tolist(), *given.labels[:4].tolist()]
    assert picked.teacher_rows.tolist()[1] == 2
    own = examples_of(pack([[7, 8]], end=0, length=5))
    both = concatenate(own, picked)
    assert both.labels.tolist() == [*own.labels.tolist(), *picked.labels.tolist()]
    assert both.teacher_rows[: len(own.labels)].eq(NO_TEACHER).all()
    assert NO_LABEL not in both.labels


def test_blocks_are_repeated_with_the_next_teacher():
    blocks = pack([list(range(1, 12))], end=0, length=5)
    asked = torch.tensor([1, 5, 9])
    given = examples_of(blocks, topk_compress(torch.randn(6, 40), 2), asked)
    twice = repeated(given, 2, len(asked))
    assert len(twice.tokens) == 2 * len(blocks)
    again = select(twice, range(len(blocks), 2 * len(blocks)))
    assert torch.equal(again.labels, given.labels)
    assert again.teacher_rows[asked].tolist() == [3, 4, 5]
    assert (again.teacher_rows != NO_TEACHER).sum() == 3


def test_a_compressed_teacher_on_disk_is_read_back(tmp_path):
    rows = topk_compress(torch.randn(10, 50), 4)
    file = TopKFile.create(tmp_path / "t.safetensors", 10, 4, 50)
    file.put(0, rows[:7])
    file.put(7, rows[7:])
    again = TopKFile.open(tmp_path / "t.safetensors")
    assert len(again) == 10
    for found, wanted in (
        (again(2, 9), rows[2:9]),
        (again[torch.tensor([8, 0])], rows[torch.tensor([8, 0])]),
    ):
        assert torch.equal(found.ids, wanted.ids)
        assert torch.equal(found.log_probs, wanted.log_probs)
        assert torch.equal(found.log_tail, wanted.log_tail)
    assert set(load_file(tmp_path / "t.safetensors")) == {"ids", "log_probs", "log_tail"}


def spec_of(rows, codec):
    code = payload.max_code_of(0.001) if codec == "threshold" else 255
    return RoundSpec("run", 1, "", rows, 50, "", codec, 4, "n", 1, ("a",), max_code=code)


@pytest.mark.parametrize("codec", ["topk", "threshold"])
def test_a_row_without_an_opinion_travels(codec):
    rows = topk_compress(torch.randn(6, 50), 4)
    rows.log_probs[2], rows.log_tail[2], rows.ids[2] = -math.inf, 0.0, torch.arange(4, dtype=torch.int32)
    spec = spec_of(6, codec)
    sent = payload.encode(encoding.compress_parts([rows], spec, 0), spec, "a")
    found = encoding.topk(payload.admit(payload.seal(sent, spec, "a"), sent, spec, set()))
    assert answered(found).tolist() == [True, True, False, True, True, True]
    assert found.log_tail[2] == 0


def test_a_run_is_whole(finished):
    result, out = finished["result"], finished["out"]
    assert result["task"] == "causal_lm"
    assert set(result["metrics"]) >= {
        "student",
        "clients",
        "public_only",
        "local_only",
        "centralized",
        "fedavg",
    }
    teacher = load_file(out / "rounds/002/teacher.safetensors")
    spec = payload.parse_spec((out / "rounds/002/spec.json").read_bytes())
    assert teacher["ids"].shape == (spec.positions, 16)
    assert teacher["log_probs"].exp().sum(1).add(teacher["log_tail"].exp()).sub(1).abs().max() < 1e-4
    best = min(row["validation_bits_per_byte"] for row in result["by_round"] if row["series"] == "student")
    chosen = [
        r for r in result["by_round"] if r["series"] == "student" and r["round"] == result["selected_round"]
    ]
    assert chosen[0]["validation_bits_per_byte"] == best, "less is better"
    assert result["bytes"]["a_row"] == pytest.approx(49, abs=8)  # tiny: the envelope counts
    assert result["teacher"][0]["answered"] == dict.fromkeys(
        result["trust"] and result["teacher"][0]["weights"], 1.0
    )
    from feddistill import report

    assert "bits/byte" in report.write(out).read_text()
    figures = experiment.evaluate(out)
    assert figures["bits_per_byte"] == result["metrics"]["student"]["bits_per_byte"]


def test_a_stopped_run_resumes_to_the_same_numbers(finished, tmp_path, monkeypatch):
    original, calls = encoding.compress_parts, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 7:  # round 2: four clients and the teacher have answered in round 1
            raise KeyboardInterrupt
        return original(*args)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "compress_parts", failing)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(parse(tiny()), out)
    assert (out / "records/rounds/001/student.json").exists()
    assert outcome(experiment.run(parse(tiny()), out, resume=True)) == outcome(finished["result"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation": {"rule": "era"}}, "aggregation.rule = era is for classification"),
        (
            {"aggregation": {"rule": {"kind": "mean_probs", "weights": "class_counts"}}},
            "weights = class_counts",
        ),
        ({"distill": {"temperature": 2}}, "distill.temperature = 2"),
        ({"distill": {"kind": "mae"}}, "distill.kind = mae"),
        ({"payload": {"codec": "dense"}}, "payload.codec = dense"),
        ({"baselines": ["fedmkt"]}, "baselines: fedmkt is for classification, not for task = causal_lm"),
        ({"simulate": {"attack": "second_best"}}, "simulate.attack"),
    ],
)
def test_what_is_of_classes_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        parse(tiny(**changes))


def test_defaults_of_the_task_survive_writing_and_reading():
    import yaml

    config = parse(tiny())
    assert (config.payload.codec, config.distill.temperature) == ("topk", 1.0)
    assert config.clients.codistillation.target == "soft"
    assert parse(yaml.safe_load(dump(config))) == config


def test_a_model_that_looks_ahead_is_refused():
    source = {"kind": "scratch", "architecture": "bert", "tokenizer": TOKENIZER}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = ModelConfig.model_validate({"source": {**source, "settings": small}, "max_tokens": 16})
    with pytest.raises(ModelError, match="looks ahead"):
        causal.build(config, 0, "clients.models.0", ["some text to learn from"] * 3)


SHAPE = {**LLAMA["source"]["settings"], "head_dim": 16}


@pytest.mark.parametrize(
    ("architecture", "setting"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("gemma2", {"final_logit_softcapping": 1000.0}),
        ("gemma3_text", {"final_logit_softcapping": 30.0}),
        ("cohere2", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 1.01}),
    ],
)
def test_a_model_that_changes_its_logits_is_refused_and_otherwise_not(architecture, setting):
    (key,) = setting
    shape = {k: v for k, v in SHAPE.items() if k != "head_dim" or architecture != "granite"}
    source = {**LLAMA["source"], "architecture": architecture, "settings": {**shape, **setting}}
    texts = ["some text to learn from"] * 3
    with pytest.raises(ModelError, match=rf"not the product of its hidden states and its head \({key} = "):
        causal.build(ModelConfig.model_validate({**LLAMA, "source": source}), 0, "student.model", texts)
    source["settings"] = {**shape, key: None if "cap" in key else 1.0}
    causal.build(ModelConfig.model_validate({**LLAMA, "source": source}), 0, "student.model", texts)


@pytest.mark.parametrize("zero", [False, True])
def test_the_check_of_a_head_finds_any_change_and_leaves_the_weights(zero):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16))
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.detach().clone() * (0 if zero else 1e-3), requires_grad=False
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    causal._is_causal(model, 50, "m")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def capped(module, given, output):
        output.logits = 20 * (output.logits / 20).tanh()

    model.register_forward_hook(capped)
    with pytest.raises(ModelError, match="m: the logits of GPT2LMHeadModel are not the product"):
        causal._is_causal(model, 50, "m")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_everybody_trains_the_same_tokenizer():
    code = """
from feddistill.config.models import TrainedTokenizer
from feddistill.models.tokenizers import fingerprint, tokenizer_of
texts = ["a text of some words", "and words of another text, 1234"] * 5
print(fingerprint(tokenizer_of(TrainedTokenizer(vocab_size=280), "s", texts)))
"""
    texts = ["a text of some words", "and words of another text, 1234"] * 5
    own = fingerprint(tokenizer_of(TrainedTokenizer(vocab_size=280), "s", texts))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == own


@pytest.mark.parametrize("codec", ["threshold", "sampled"])
def test_other_codecs_and_every_third_position(codec, tmp_path):
    changes = {"payload": {"codec": codec}, "language": {"position_stride": 3}, "rounds": 1, "baselines": []}
    result = experiment.run(parse(tiny(**changes)), tmp_path / "run")
    spec = payload.parse_spec((tmp_path / "run/rounds/001/spec.json").read_bytes())
    config = parse(tiny(**changes))
    splits = experiment.check(config, build=False)
    model = config.student.model
    tokenizer = tokenizer_of(model.source, "s", splits.proxy.texts)
    reader = causal.reader_of(tokenizer, model, config.language, "s")
    assert spec.positions == reader.blocks(splits.proxy, 48).rows // 3
    assert result["metrics"]["student"]["bits_per_byte"] < 8


def test_what_a_run_would_cost_is_known_before():
    found = plan.plan(parse(tiny(baselines=["public_only"])))
    config = parse(tiny())
    splits = experiment.check(config, build=False)
    model = config.student.model
    tokenizer = tokenizer_of(model.source, "student.model", splits.proxy.texts)
    reader = causal.reader_of(tokenizer, model, config.language, "student.model")
    assert found["rows"] == reader.blocks(splits.proxy, 48).rows
    assert found["bytes"]["codecs"]["topk k=16"]["a_row"] == pytest.approx(49, abs=2)
    assert found["bytes"]["federated_lora"]["upload"] > 0
    assert set(found["seconds"]) == {*found["flops"]}
    assert found["seconds"]["total"] > 0  # of its parts some are of milliseconds


def test_a_study_of_them_is_told_in_bits_per_byte(tmp_path):
    (tmp_path / "base.yaml").write_text(json.dumps(tiny(rounds=1, baselines=[])))
    content = {"name": "lm", "base": "base.yaml", "seeds": [0], "target": 20, "cases": {"little": {}}}
    content["cases"]["much"] = {"distill.kd_weight": 0.9}
    (tmp_path / "study.yaml").write_text(json.dumps(content))
    assert study.sweep(study.load(tmp_path / "study.yaml"), tmp_path / "out") == {}
    page = studies.write(tmp_path / "out").read_text()
    assert "bits per byte on the test set" in page
    assert "The target is bits per byte of 20" in page
    with (tmp_path / "out/summary.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file) if row["who"] == "student"}
    cells = tmp_path / "out/cells"
    for case, row in rows.items():
        result = json.loads((cells / f"case={case}_seed=0/result.json").read_text())
        assert float(row["bits_per_byte"]) == result["metrics"]["student"]["bits_per_byte"]
        assert float(row["target_round"]) == 1  # less is better, and nobody needs so many
