"""Classification of pairs of texts, and what stands between a prompt and its text."""

import csv
import json
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from feddistill import data, models, training
from feddistill.accounting import FlopMeter
from feddistill.benchmarks.classification import by_answers
from feddistill.cli import main
from feddistill.config import parse, presets
from feddistill.config.data import DataConfig, FileSource
from feddistill.config.models import ModelConfig
from feddistill.config.training import TrainingConfig
from feddistill.data.sources import read
from feddistill.errors import ConfigError, DataError, ModelError
from feddistill.modelio import inference
from feddistill.modelio.padding import TYPE, inputs, pad
from feddistill.runs import experiment, trained_models

PAIRS = (
    ("a dog runs", "a cat sits"),
    ("a cat", "a dog " * 20),
    ("a small animal " * 20, "fish"),
    ("", "fish"),
)
TEXTS = tuple(f"{first}\n{second}" for first, second in PAIRS)
STARTS = tuple(len(first) + 1 for first, _ in PAIRS)
FIRSTS, SECONDS = (list(column) for column in zip(*PAIRS, strict=True))


@pytest.fixture(scope="module")
def bert(tiny_model, tmp_path_factory):
    """``tiny_model`` with BERT's own template of pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder


def classifier(folder, **changes):
    source = {"kind": "hub", "name": str(folder)}
    config = ModelConfig.model_validate({"source": source, "max_tokens": 24, "head": "auto"} | changes)
    return config, models.build(config, 2, 0, "m")


def answers(specialist, tokens):
    return inference.answer(
        specialist.model,
        tokens,
        2,
        pad_id=specialist.pad_id,
        batch_size=2,
        bf16=False,
        meter=FlopMeter(specialist.model),
    )


@pytest.mark.parametrize("head", ["auto", "mean_pool"])
def test_pairs_are_read_as_the_tokenizer_pairs_them(bert, head):
    _, specialist = classifier(bert, head=head)
    tokens = specialist.encode(TEXTS, STARTS)
    batch = specialist.tokenizer(
        FIRSTS, SECONDS, truncation=True, max_length=24, padding=True, return_tensors="pt",
        return_token_type_ids=True,
    )  # fmt: skip
    ids, mask = pad(tokens, specialist.pad_id, exact=True)
    given = inputs(ids)
    assert torch.equal(given["input_ids"], batch["input_ids"])
    assert torch.equal(given["token_type_ids"], batch["token_type_ids"])
    assert torch.equal(mask, batch["attention_mask"])
    assert max(map(len, tokens)) == 24
    with torch.inference_mode():
        expected = specialist.model.eval()(**batch).logits.log_softmax(-1)
    torch.testing.assert_close(answers(specialist, tokens), expected)
    untyped = answers(specialist, [[token % TYPE for token in text] for text in tokens])
    assert not torch.allclose(untyped, expected, atol=1e-4)


def test_a_model_without_token_types_gets_none(bert, tiny_causal, tiny_model):
    source = {
        "kind": "scratch",
        "architecture": "distilbert",
        "tokenizer": {"kind": "hub", "name": str(bert)},
    }
    settings = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 24}
    _, distil = classifier(bert, source={**source, "settings": settings})
    ids = distil.tokenizer(FIRSTS, SECONDS, truncation=True, max_length=24).input_ids
    assert distil.encode(TEXTS, STARTS) == ids
    _, causal = classifier(tiny_causal)
    first, second = (causal.tokenizer(text).input_ids for text in ("a dog runs", "\na cat sits"))
    assert causal.encode(TEXTS[:1], STARTS[:1]) == [first + second]  # not "runsa"


def test_frozen_layers_tell_types_apart(bert):
    frozen = {"freeze_embeddings": True, "freeze_layers": 1, "frozen_cache_mb": 1}
    (config, caching), (_, plain) = classifier(bert, **frozen), classifier(bert)
    layers = models.remember_frozen(caching.model, config, "m", {})
    tokens = plain.encode(TEXTS, STARTS)
    tokens += [[token % TYPE for token in text] for text in tokens]
    assert layers.fill(tokens) == 0
    assert len(layers.states.kept) == len(tokens)
    torch.testing.assert_close(answers(caching, tokens), answers(plain, tokens), rtol=1e-5, atol=1e-5)


def test_training_reads_token_types(bert):
    _, specialist = classifier(bert)
    examples = training.TrainingExamples(specialist.encode(TEXTS, STARTS), torch.tensor([0, 1, 0, 1]))
    meter, seen = FlopMeter(specialist.model), []  # the meter runs a copy of the model, without the hook
    specialist.model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    training.fit(
        specialist.model,
        examples,
        TrainingConfig(batch_size=4),
        loss=training.TextLoss(examples, None),
        seed=0,
        bf16=False,
        pad_id=specialist.pad_id,
        head=set(),
        meter=meter,
        steps=1,
    )
    ((read,), right) = seen, inputs(pad(examples.tokens, specialist.pad_id)[0])
    for name in ("input_ids", "token_type_ids"):  # in any order
        assert sorted(read[name].tolist()) == sorted(right[name].tolist())


def test_a_pair_needs_room(bert):
    _, specialist = classifier(bert, max_tokens=4)
    with pytest.raises(ModelError, match="max_tokens = 4, but a pair of texts needs at least 5"):
        specialist.encode(TEXTS, STARTS)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Pairs of texts, labelled by whether both have the same meaning."""
    path = tmp_path_factory.mktemp("texts") / "pairs.csv"
    words = ["dog", "cat", "fish", "building", "animal"]
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["first", "second", "same"])
        for n in range(160):
            one, other = words[n % 5], words[(n + n // 5 % 2) % 5]
            rows.writerow([f"a {one} {n}", f"the {other}", "yes" if one == other else "no"])
    return path


def columns(path, **more):
    return {"kind": "files", "path": str(path), "text_column": "first", "label_column": "same", **more}


@pytest.fixture(scope="module")
def run(bert, questions, new_tiny_settings, tmp_path_factory):
    settings = new_tiny_settings() | {"rounds": 1, "baselines": ["fedfed"]}
    settings["data"] = {
        "source": columns(questions, pair_column="second"),
        "private": {"size": 60},
        "proxy": {"size": 40, "labelled": 20},
        "validation": {"size": 20},
        "test": {"size": 40},
        "partition": {"kind": "iid", "clients": 2},
    }
    model = {"source": {"kind": "hub", "name": str(bert)}, "max_tokens": 24, "head": "auto"}
    settings["clients"]["models"] = [
        {**model, "freeze_embeddings": True, "frozen_cache_mb": 1, "freeze_layers": 1}
    ]
    settings["clients"]["codistillation"] = {"examples": 20}
    settings["student"]["model"] = model
    folder = tmp_path_factory.mktemp("run")
    config = parse(settings)
    experiment.run(config, folder / "run")
    return folder / "run", config


def feddistill(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_a_run_of_pairs_is_exported_as_it_answers(run, questions, tmp_path):
    folder, config = run
    own = json.loads(feddistill("evaluate", folder, "--json").stdout)
    assert feddistill("export", folder, "--out", tmp_path / "model", "--licence", "mit").exit_code == 0
    assert '"text_pair": "its second text"' in (tmp_path / "model" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    test = data.load(config.data, config.seed).test
    firsts, seconds = zip(*(text.split("\n") for text in test.texts), strict=True)
    batch = tokenizer(list(firsts), list(seconds), padding=True, return_tensors="pt")
    assert batch["token_type_ids"].any()
    with torch.inference_mode():
        logits = model(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(test.labels))
    assert own["cross_entropy"] == pytest.approx(float(loss), abs=2e-5)


def test_other_texts_for_a_run_of_pairs_are_pairs(run, questions):
    names = ["--texts", questions, "--text-column", "first", "--label-column", "same"]
    done = feddistill("evaluate", run[0], *names, "--pair-column", "second", "--json")
    assert json.loads(done.stdout)["examples"] == 160
    done = feddistill("evaluate", run[0], *names)
    assert done.exit_code == 2
    assert "data.test has pairs of texts (pair_column), and --texts has not" in done.output
    with pytest.raises(ConfigError, match="reads pairs of texts"):
        by_answers(trained_models.load(run[0]), presets.find("glue/rte"), {}, lambda *_: None)


def test_the_digest_knows_where_the_second_text_begins(questions):
    whole = data.labelled(
        FileSource.model_validate(columns(questions, pair_column="second")), ("no", "yes"), "t"
    )
    assert whole.texts[0] == "a dog 0\nthe dog"
    assert whole.starts[0] == len("a dog 0\n")
    assert b'"start":8' in next(iter(data.lines(whole)))


REFUSED = {
    "prompt": (
        "classification",
        {"prompt_column": "second"},
        "prompt_column is not for task = classification: pair_column",
    ),
    "question": (
        "classification",
        {"question_column": "second"},
        "question_column is not for task = classification",
    ),
    "pair": (
        "causal_lm",
        {"pair_column": "second"},
        "pair_column is for classification, not for task = causal_lm",
    ),
    "answer": ("question_answering", {"pair_column": "second"}, "pair_column is for classification, not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_columns_that_a_task_does_not_read_are_refused(case, questions):
    task, more, message = REFUSED[case]
    given = FileSource.model_validate(columns(questions, **more))
    load = partial(data.load, DataConfig.model_validate({"source": given.model_dump()}), 0, task)
    for reading in (load, partial(data.labelled, given, ("no", "yes"), "data.source", task)):
        with pytest.raises(DataError, match=f"^data.source: {message}"):
            reading()


def test_pairs_and_texts_do_not_mix(questions):
    given = {"source": columns(questions, pair_column="second"), "proxy": {"source": columns(questions)}}
    with pytest.raises(
        DataError, match=r"data.source has pairs of texts \(pair_column\), and data.proxy has not"
    ):
        data.load(DataConfig.model_validate(given), 0)


def test_a_separator_stands_between_prompt_and_text(questions):
    source = columns(questions, prompt_column="second", prompt_separator=" ")
    table = read(FileSource.model_validate(source), "data.source")
    assert table.texts[0] == "the dog a dog 0"
    assert table.starts[0] == len("the dog ")
    plain = read(FileSource.model_validate(columns(questions, prompt_column="second")), "data.source")
    assert plain.texts[0] == "the doga dog 0"
    with pytest.raises(ValidationError, match="prompt_separator needs prompt_column"):
        FileSource.model_validate(columns(questions, prompt_separator=" "))
    with pytest.raises(ValidationError, match="set prompt_column or pair_column, not both"):
        FileSource.model_validate(columns(questions, prompt_column="same", pair_column="second"))
