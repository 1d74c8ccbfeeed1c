"""A run's student as others load it: the same answers, a card of what it is, a hub that is not there."""

import re

import hub_fixtures as hub
import pytest
import torch
import yaml
from click.testing import CliRunner

from feddistill import experiment, release, students
from feddistill.cli import main
from feddistill.config import parse
from feddistill.errors import ModelError, RunError
from feddistill.evaluation import classification
from feddistill.presets import PRESETS

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
                "private": {"size": 80},
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
    student = students.of_run(run)
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
    sentence_transformers = pytest.importorskip("sentence_transformers")
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
    assert "client-0 | 40 | a local model |" in body
    assert "client-1 | 40 | a local model, layers 1 |" in body
    assert "rule `mean_probs`" in body
    assert "no formal guarantee" in body
    assert str(tmp_path.parent) not in (tmp_path / "student" / "README.md").read_text(), "no path of ours"


def test_clients_can_stay_unnamed(run, tmp_path):
    _, body = card_of(release.export(run, tmp_path / "student", anonymous=True))
    assert "client-0" not in body
    assert "client 2 | not told |" in body


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

    student = students.of_folder(tiny_causal)
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
    assert students.of_folder(tmp_path).max_tokens == student.max_tokens


def test_figures_of_the_release_are_those_of_the_definition(run, glue):
    """The benchmark's figures are those of the run's own answers to the split's rows."""
    from feddistill import benchmarks

    student = students.of_run(run)
    rows = hub.reviews(40, 1)
    tokens = student.specialist.encode(tuple(row["sentence"] for row in rows))
    with torch.no_grad():
        answers = torch.stack([student.model(input_ids=torch.tensor([ids])).logits[0] for ids in tokens])
    labels = torch.tensor([row["label"] for row in rows]).numpy()
    expected = classification(answers.log_softmax(-1).numpy(), labels).as_dict()
    found = benchmarks.evaluate(student, benchmarks.Request(PRESETS["glue/sst2"], glue))
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)
