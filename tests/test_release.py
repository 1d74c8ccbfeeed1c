"""A run's student as others load it: the same answers, a card of what it is, a hub that is not there."""

import json
import re
import shutil

import hub_fixtures as hub
import pytest
import torch
import yaml
from click.testing import CliRunner
from language_fixtures import GPT2, LLAMA, tiny
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from feddistill import models, release
from feddistill.cli import main
from feddistill.config import parse
from feddistill.config.presets import PRESETS
from feddistill.errors import ModelError, RunError
from feddistill.metrics import classification
from feddistill.models import causal
from feddistill.runs import experiment, trained_models
from feddistill.store import layout

TEXTS = ["a warm film and a bright scene", "a dull story", "noisy " * 40]


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return hub.glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module", params=["mean_pool", "auto"])
def run(request, tiny_model, glue, tmp_path_factory):
    """A complete run on SST-2 in miniature, read through the preset."""
    out = tmp_path_factory.mktemp("runs") / "reviews"
    sst2 = {"kind": "preset", "name": "glue/sst2", "path": str(glue)}
    model = {
        "source": {"kind": "hub", "name": str(tiny_model)},
        "head": request.param,
        "max_tokens": 24,
    }
    training = {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3, "head_learning_rate": 1e-2}
    config = parse(
        {
            "name": "reviews",
            "rounds": 1,
            "threads": 1,
            "precision": "fp32",
            "data": {
                "source": sst2,
                "private": {"size": 48},
                "proxy": {"source": {**sst2, "split": "test"}},
                "validation": {"size": 40},
                "test": {"source": {**sst2, "split": "validation"}},
                "partition": {"kind": "iid", "clients": 2},
            },
            "clients": {"models": [model, {**model, "layers": [1]}], "training": training},
            "student": {"model": {**model, "layers": [0]}, "training": training},
        }
    )
    experiment.run(config, out)
    return out


def wider(model):
    """Of 320 tokens: benchmarks' prompts are longer than the 48 of the other tests."""
    source = model["source"]
    length = "n_positions" if source["architecture"] == "gpt2" else "max_position_embeddings"
    source = {**source, "settings": {**source["settings"], length: 320}}
    return {"source": source, "max_tokens": 320}


@pytest.fixture(scope="module")
def language_run(tmp_path_factory):
    """A complete run of language models, whose tokenizer it has trained itself."""
    out = tmp_path_factory.mktemp("runs") / "speeches"
    training = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2}
    changes = {
        "name": "speeches",
        "rounds": 1,
        "clients": {"models": [wider(GPT2)], "training": training},
        "student": {"model": {**wider(LLAMA), "layers": [1]}, "training": training},
        "baselines": [],
    }
    experiment.run(parse(tiny(**changes)), out)
    return out


@pytest.fixture(scope="module")
def language_export(language_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "student"
    done = feddistill("export", language_run, "--out", out, "--licence", "mit")
    assert done.exit_code == 0, done.stderr
    return out


def feddistill(*arguments):
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def logits_of_run(run):
    """By the run's own code: its model built anew, its weights put back."""
    student = trained_models.of_run(run)
    tokens = student.specialist.encode(tuple(TEXTS))
    with torch.no_grad():
        found = [student.model(input_ids=torch.tensor([ids])).logits[0] for ids in tokens]
    return torch.stack(found)


def test_what_is_exported_answers_as_the_student_does(run, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "student"
    done = feddistill("export", run, "--out", out, "--licence", "apache-2.0")
    assert done.exit_code == 0, done.stderr
    metadata, body = card_of(out)
    expected = logits_of_run(run)
    if metadata["library_name"] == "transformers":
        model, tokenizer = (
            a.from_pretrained(out) for a in (AutoModelForSequenceClassification, AutoTokenizer)
        )
        batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert model.config.id2label == {0: "negative", 1: "positive"}
    else:  # the card's own lines
        code = re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)[1]
        space = {}
        exec(code.replace('folder = "."', f"folder = {str(out)!r}").replace(
            '["some text", "another"]', repr(TEXTS)), space)  # fmt: skip
        found = space["logits"]
        assert capsys.readouterr().out.strip() == str(
            [("negative", "positive")[int(place)] for place in expected.argmax(1)]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not list(out.rglob("*.bin")), "safetensors alone"
    assert not list(out.parent.glob("*.partial"))


def test_sentence_transformers_give_the_same_logits(run, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the package of the layout")
    out = release.export(run, tmp_path / "student")
    if not (out / "modules.json").exists():
        pytest.skip("a model of transformers")
    model = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    found = torch.from_numpy(model.encode(TEXTS))
    torch.testing.assert_close(found, logits_of_run(run), rtol=1e-4, atol=1e-5)


def test_a_run_and_its_export_have_the_same_figures(run, glue, tmp_path):
    out = release.export(run, tmp_path / "student")
    figures = []
    for place in (run, out):
        done = feddistill("evaluate", place, "--benchmark", "glue/sst2", "--path", glue, "--json")
        assert done.exit_code == 0, done.stderr
        figures.append({**yaml.safe_load(done.stdout), "model": ""})
    assert figures[0] == figures[1]
    # And those of the run itself, whose test set this is.
    own = yaml.safe_load(feddistill("evaluate", run, "--json").stdout)
    assert own["accuracy"] == figures[0]["accuracy"] > 0.5
    assert own["examples"] == figures[0]["examples"] == 40


def test_the_card_says_what_the_student_is_made_of(run, tmp_path):
    metadata, body = card_of(release.export(run, tmp_path / "student", licence="apache-2.0"))
    result = yaml.safe_load((run / "result.json").read_text())
    assert metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "text-classification"
    assert metadata["datasets"] == ["nyu-mll/glue"]
    measured = {m["type"]: m["value"] for m in metadata["model-index"][0]["results"][0]["metrics"]}
    assert measured["accuracy"] == result["metrics"]["student"]["accuracy"]
    assert f"| student (feddistill) | {result['metrics']['student']['accuracy']:.3f} |" in body
    assert "glue/sst2 (nyu-mll/glue), test" in body
    assert "client-0 | 24 | a local model |" in body
    assert "client-1 | 24 | a local model, layers 1 |" in body
    assert "rule `mean_probs`" in body
    assert "no formal guarantee" in body
    assert str(tmp_path.parent) not in (tmp_path / "student" / "README.md").read_text(), "no path of ours"


def test_clients_can_stay_unnamed(run, tmp_path):
    _, body = card_of(release.export(run, tmp_path / "student", anonymous=True))
    assert "client-0" not in body
    assert "client 2 | not reported |" in body


def test_what_is_in_the_way_stays(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(RunError, match="already exists"):
        release.export(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    done = feddistill("export", tmp_path / "gone")
    assert done.exit_code == 2
    assert "gone is not a run" in done.stderr


def test_the_hub_gets_the_folder(run, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo, **kw: calls.append((repo, kw)))

    def upload(_, *, repo_id, folder_path, commit_message):
        calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    done = feddistill("export", run, "--out", tmp_path / "s", "--push", "me/reviews", "--private")
    assert done.exit_code == 0, done.stderr
    assert "hub: https://hub/me/reviews" in done.stdout
    assert calls[0] == ("me/reviews", {"private": True, "exist_ok": True})
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(calls[1][1])


def test_without_a_network_the_export_is_there_and_one_line_says_so(run, tmp_path):
    done = feddistill("export", run, "--out", tmp_path / "s", "--push", "me/reviews")
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("feddistill: --push me/reviews: ")
    assert "the export is complete" in line
    assert (tmp_path / "s" / "config.json").exists()
    with pytest.raises(ModelError, match="--push"):
        release.push(tmp_path / "s", "no such name!")


def test_a_language_model_is_exported_as_transformers_generates(tiny_causal, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = trained_models.of_folder(tiny_causal)
    student.model.config.use_cache = False  # as training leaves it
    release.write_model(student, tmp_path)
    model, tokenizer = (a.from_pretrained(tmp_path) for a in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("a warm film", return_tensors="pt")["input_ids"]
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, student.model(ids).logits)
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert ids.shape[1] < written.shape[1] <= ids.shape[1] + 5
    assert trained_models.of_folder(tmp_path).max_tokens == student.max_tokens


def test_figures_of_the_release_are_those_of_the_definition(run, glue):
    """The benchmark's figures are those of the run's own answers to the split's rows."""
    from feddistill import benchmarks

    student = trained_models.of_run(run)
    rows = hub.reviews(40, 1)
    tokens = student.specialist.encode(tuple(row["sentence"] for row in rows))
    with torch.no_grad():
        answers = torch.stack([student.model(input_ids=torch.tensor([ids])).logits[0] for ids in tokens])
    labels = torch.tensor([row["label"] for row in rows]).numpy()
    expected = classification(answers.log_softmax(-1).numpy(), labels).as_dict()
    found = benchmarks.evaluate(student, benchmarks.Request(PRESETS["glue/sst2"], glue))
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)


def test_a_run_of_language_models_is_exported_with_the_tokenizer_it_trained(language_run, language_export):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = experiment.stored_config(language_run)
    splits = experiment.check(config, build=False)
    student = causal.build(config.student.model, 0, "student.model", splits.proxy.texts)
    weights = json.loads((language_run / "result.json").read_text())["student_weights"]
    models.restore(student.model, language_run / weights)

    model, tokenizer = (a.from_pretrained(language_export) for a in (AutoModelForCausalLM, AutoTokenizer))
    text = splits.test.texts[0][:200]
    batch = tokenizer(text, return_tensors="pt")
    own = student.reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0].tolist() == own
    assert tokenizer.decode(own) == text
    with torch.no_grad():
        expected = student.model.eval()(input_ids=torch.tensor([own])).logits
        torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)

    ids = list(own)
    while len(ids) < len(own) + 6:  # greedy search without a cache
        with torch.no_grad():
            ids.append(int(student.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert model.generate(**batch, max_new_tokens=6, do_sample=False)[0].tolist() == ids
    begun = model.generate(max_new_tokens=3, do_sample=False)[0].tolist()  # of nothing
    assert begun[0] == tokenizer.eos_token_id
    assert len(begun) > 1
    assert tokenizer.model_max_length == 320


def test_the_card_of_a_language_model(language_run, language_export, capsys):
    metadata, body = card_of(language_export)
    own = json.loads((language_run / "result.json").read_text())["metrics"]["student"]
    assert metadata["pipeline_tag"] == "text-generation"
    measured = {m["type"]: m["value"] for m in metadata["model-index"][0]["results"][0]["metrics"]}
    assert measured == own
    assert f"| student (feddistill) | {own['bits_per_byte']:.3f} | {own['perplexity']:.3f} |" in body
    assert "started from llama from random weights, with a tokenizer trained on the public texts" in body
    code = re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)[1]
    exec(code.replace('folder = "."', f"folder = {str(language_export)!r}"), {})
    assert "Once upon a time" in capsys.readouterr().out


def figures_of(place, *arguments):
    done = feddistill("evaluate", place, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return {**json.loads(done.stdout), "model": "", "run": ""}


def test_a_language_model_is_evaluated_on_its_own_texts_and_on_others(language_run, tmp_path):
    own = json.loads((language_run / "result.json").read_text())["metrics"]["student"]
    found = figures_of(language_run)
    assert {key: found[key] for key in own} == own
    texts = experiment.check(experiment.stored_config(language_run), build=False).test.texts
    rows = [{"before": text[:9], "said": text[9:]} for text in texts]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = figures_of(
        language_run, "--texts", tmp_path / "mine.jsonl", "--text-column", "said", "--prompt-column", "before"
    )
    assert found["examples"] == 4
    assert {key: found[key] for key in own} == pytest.approx(own, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "folder", "ranks"),
    [
        ("wikitext-2", hub.wikitext, "bits_per_byte"),
        ("squad", hub.squad_1, "f1"),
        ("glue/sst2", hub.glue, "accuracy"),
    ],
)
def test_a_run_of_language_models_has_the_figures_of_its_export(
    language_run, language_export, tmp_path, name, folder, ranks
):
    arguments = ("--benchmark", name, "--path", folder(tmp_path), "--limit", 4)
    found = figures_of(language_run, *arguments)
    assert found == figures_of(language_export, *arguments)
    assert found["ranks_by"] == ranks
    assert found[ranks] >= 0


def test_a_tokenizer_is_not_trained_on_other_texts(language_run, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(language_run, changed)
    digests = json.loads((changed / layout.DIGESTS).read_text())
    (changed / layout.DIGESTS).write_text(json.dumps({**digests, "data.proxy": "0"}))
    with pytest.raises(RunError, match=r"data\.proxy is not what .* the data have changed"):
        release.export(changed, tmp_path / "student")


@pytest.mark.parametrize(
    ("architecture", "positions", "pad", "reads"),
    [
        ("roberta", 66, "[UNK]", 64),
        ("roberta", 73, "[UNK]", 71),
        ("xlm-roberta", 66, "e", None),  # of whatever id
        ("bert", 64, "[PAD]", 64),
        ("gpt2", 50, "[PAD]", 48),
    ],
)
def test_the_length_that_a_folder_reads_is_tried(architecture, positions, pad, reads, tiny_model, tmp_path):
    """``max_position_embeddings`` is not it, and the tokenizer may have no ``model_max_length``."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = pad
    names = {"gpt2": ("n_embd", "n_layer", "n_head", "n_positions")}.get(
        architecture, ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    )
    size = dict(zip(names, (32, 1, 2, positions), strict=True))
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(architecture, **size, **special)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = trained_models.of_folder(tmp_path)
    assert student.max_tokens == (reads or positions - tokenizer.pad_token_id - 1)
    long = student.specialist.encode(("word " * 200,))[0]
    ids = torch.tensor([long])
    assert student.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
