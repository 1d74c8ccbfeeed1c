"""The tables of tasks and methods: each entry is complete, and a new entry is found everywhere."""

import dataclasses
import json
import sys
from importlib import import_module

import matplotlib.axes
import pytest
import transformers
import yaml
from click.testing import CliRunner

from feddistill import data, release, report
from feddistill.cli import main
from feddistill.config import Config, parse
from feddistill.config.methods import FEDERATED, METHODS, Method, baselines, row_labels
from feddistill.config.tasks import TASKS, Task
from feddistill.errors import ConfigError, DataError
from feddistill.runs import experiment, plan
from feddistill.tasks.choose import learner_class
from feddistill.tasks.learner import Learner

TASK = '''
"""Text classification, evaluated by its errors."""

from typing_extensions import override

from feddistill.tasks.classification import Classifier


class Errors(Classifier):
    """A classifier of texts."""

    @override
    def metrics(self, texts, on_step=None):
        return {"error_rate": round(1 - super().metrics(texts, on_step)["accuracy"], 6)}
'''

BASELINE = '''
"""Baseline: the student on the labelled proxy texts alone, under another name."""

from feddistill.methods.public_only import known_texts
from feddistill.methods.student_alone import student_jobs, student_rounds


def run(session):
    """Train on the labelled proxy texts."""
    return {"rounds": student_rounds(session, "dummy", known_texts(session))}


def plan(session, learners, student):
    """The jobs of ``run``."""
    return student_jobs(session, "dummy", student, known_texts(session))
'''


def module(folder, monkeypatch, name, text):
    """Write an importable module."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def dummy_task(tmp_path, monkeypatch):
    module(tmp_path, monkeypatch, "dummy_task", TASK)
    entry = Task(
        learner="dummy_task:Errors",
        label="counting errors",
        metrics=("error_rate",),
        shown={"error_rate": "error rate"},
        decides="error_rate",
        words="error rate",
        larger_is_better=False,
        percent=True,
        row="dummy row",
        choices="kinds",
        pipeline="dummy-pipeline",
        defaults={"distill": {"temperature": 3.0}},
    )
    monkeypatch.setitem(TASKS, "dummy", entry)
    return "dummy"


@pytest.fixture
def dummy_baseline(tmp_path, monkeypatch):
    module(tmp_path, monkeypatch, "dummy_baseline", BASELINE)
    style = {"color": "#123456", "marker": "h"}
    entry = Method(module="dummy_baseline", label="Dummy baseline", style=style, needs_labels=True)
    monkeypatch.setitem(METHODS, "dummy", entry)
    return "dummy"


def test_a_new_task_is_found_everywhere(dummy_task, tiny_settings, tmp_path, capsys):
    settings = {**tiny_settings, "task": dummy_task, "baselines": ["public_only", "local_only"]}
    config = parse(settings)
    assert config.distill.temperature == 3.0, "a default of the task"
    file = tmp_path / "dummy.yaml"
    file.write_text(yaml.safe_dump(settings))

    planned = CliRunner().invoke(main, ["plan", str(file)])
    assert planned.exit_code == 0, planned.output
    assert "one a dummy row" in planned.output
    assert "10 kinds" in planned.output

    out = tmp_path / "run"
    result = experiment.run(config, out)
    assert result["task"] == dummy_task
    student = result["metrics"]["student"]
    assert set(student) == {"error_rate"}
    by_round = [row for row in result["by_round"] if row["series"] == "student"]
    best = min(by_round, key=lambda row: row["validation_error_rate"])
    assert student["error_rate"] == best["test_error_rate"], "the smallest error is the best"
    assert set(result["metrics"]["public_only"]) == {"error_rate"}
    assert experiment.evaluate(out)["error_rate"] == student["error_rate"]

    page = report.write(out).read_text()
    assert "error rate on the test set" in page
    assert f"{student['error_rate']:.3f}" in page
    report.print_table(result)
    assert "error rate" in capsys.readouterr().out

    folder = release.export(out, tmp_path / "student")
    metadata = next(yaml.safe_load_all((folder / "README.md").read_text()))
    assert metadata["pipeline_tag"] == "dummy-pipeline"
    (measured,) = metadata["model-index"][0]["results"]
    assert measured["metrics"] == [{"type": "error_rate", "value": student["error_rate"]}]
    names = json.loads((folder / "config.json").read_text())["id2label"]
    assert list(names.values()) == list(experiment.check(config, build=False).label_names)


def test_a_task_decides_which_labels_texts_need(dummy_task, tiny_settings, monkeypatch):
    plain = {"kind": "embedded", "name": "wordnet_topics"}
    settings = {**tiny_settings, "task": dummy_task, "baselines": []}
    config = parse({**settings, "data": {**settings["data"], "source": plain}})
    assert len(data.load(config.data, 0, dummy_task).label_names) == 10
    answers = dataclasses.replace(TASKS[dummy_task], labels="answer")
    monkeypatch.setitem(TASKS, dummy_task, answers)
    with pytest.raises(DataError, match="task = dummy needs questions"):
        data.load(config.data, 0, dummy_task)
    tokens = dataclasses.replace(TASKS[dummy_task], labels="tokens", dense=False)
    monkeypatch.setitem(TASKS, dummy_task, tokens)
    with pytest.raises(
        ConfigError, match=r"payload\.codec = dense is for classification, not for task = dummy"
    ):
        parse(settings)


def test_a_task_that_is_not_in_the_table_is_refused():
    with pytest.raises(ConfigError, match=r"task = .* does not exist; did you mean 'causal_lm'\?"):
        parse({"task": "causal"})
    with pytest.raises(ConfigError, match="choose from classification, causal_lm, masked_lm, question_ans"):
        parse({"task": "xyz"})


def test_a_new_baseline_is_found_everywhere(dummy_baseline, tiny_settings, tmp_path, capsys, monkeypatch):
    settings = {**tiny_settings, "baselines": ["public_only", dummy_baseline]}
    config = parse(settings)
    out = tmp_path / "run"

    costs = plan.plan(config)
    for part in (costs["flops"], costs["seconds"]):
        assert part["baseline_dummy"] > 0
    assert costs["flops"]["baseline_dummy"] == costs["flops"]["baseline_public_only"]

    result = experiment.run(config, out)
    ours, twin = result["metrics"][dummy_baseline], result["metrics"]["public_only"]
    assert 0 < ours["accuracy"] < 1
    assert set(ours) == set(twin)
    assert {row["round"] for row in result["by_round"] if row["series"] == dummy_baseline} == {1, 2}

    drawn, plot = [], matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda *a, **more: (drawn.append(more), plot(*a, **more))[1]
    )
    page = report.write(out).read_text()
    assert {"color": "#123456", "marker": "h", "label": "dummy"} in drawn
    assert "Dummy baseline" in page
    assert dummy_baseline in (out / "metrics.csv").read_text()
    report.print_table(result)
    assert "Dummy baseline" in capsys.readouterr().out

    compared = CliRunner().invoke(main, ["compare", str(out), "--json"])
    assert compared.exit_code == 0, compared.output
    assert "Dummy baseline" in compared.output
    card = (release.export(out, tmp_path / "student") / "README.md").read_text()
    assert f"| Dummy baseline | {ours['accuracy']:.3f} |" in card


def test_a_new_baseline_is_refused_as_its_entry_says(dummy_baseline, tiny_settings, monkeypatch):
    proxy = {"size": 120, "labelled": 0}
    settings = {**tiny_settings, "baselines": [dummy_baseline]}
    unlabelled = parse({**settings, "data": {**settings["data"], "proxy": proxy}})
    with pytest.raises(ConfigError, match=r"baselines: dummy needs labels, but data\.proxy\.labelled is 0"):
        experiment.check(unlabelled, build=False)
    entry = dataclasses.replace(METHODS[dummy_baseline], package="no_such_package", extra="lora")
    monkeypatch.setitem(METHODS, dummy_baseline, entry)
    with pytest.raises(ConfigError, match=r"dummy needs the package no_such_package: pip install 'fedd"):
        experiment.check(parse(settings), build=False)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_complete(name):
    task = TASKS[name]
    kind = learner_class(name)
    assert issubclass(kind, Learner)
    assert not kind.__abstractmethods__
    assert not kind.query_only
    if task.query_only is not None:
        queried = learner_class(name, query_only=True)
        assert queried.query_only
        assert not queried.__abstractmethods__
    assert (task.query_only is None) == (not task.query_only_sources)
    assert task.decides in task.metrics
    assert set(task.shown) <= set(task.metrics)
    assert task.decides in task.shown
    assert all(hasattr(transformers, auto) for auto in task.heads.values())
    assert parse({"task": name, "data": {"proxy": {"labelled": 0}}}).task == name
    for setting in task.fixed:
        group: type = Config
        for part in setting.split("."):
            field = group.model_fields[part]  # KeyError: no such setting
            group = field.annotation


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_complete(name):
    method = METHODS[name]
    loaded = import_module(method.module)
    if name != FEDERATED:  # the method itself is run by experiment.run, with the student
        assert callable(loaded.run)
        keys = {f"{name}_mean", f"{name}_best"} if method.model_per_client else {name}
        assert keys <= set(row_labels())
    assert callable(getattr(loaded, method.plan))
    assert method.label
    assert (method.style is None) == method.model_per_client, "a curve, or one model per client"
    assert method.tasks is None or method.tasks <= set(TASKS)
    assert (method.package is None) == (method.extra is None)
    field = Config.model_fields.get(name)
    assert method.settings is (None if field is None else field.annotation)


def test_the_labels_and_styles_of_methods_differ():
    labels = row_labels()
    assert len(set(labels.values())) == len(labels)
    styles = [tuple(sorted(method.style.items())) for method in METHODS.values() if method.style]
    assert len(set(styles)) == len(styles)
    assert FEDERATED not in baselines()
