"""What users get wrong: it is said in one line, before anything is written, and nothing else is changed."""

import json

import pytest
import question_fixtures
import yaml
from click.testing import CliRunner

from feddistill import config as configuration
from feddistill import data
from feddistill.cli import main
from feddistill.config import institution, parse
from feddistill.engines.flower import deployment
from feddistill.errors import ConfigError, DataError, ModelError, RunError
from feddistill.runs import experiment, plan, rerun, study


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_override_changes_no_group_that_yaml_has_tied_to_it(tiny_settings, tmp_path):
    path = tmp_path / "tied.yaml"
    text = yaml.safe_dump(tiny_settings)
    assert "*id" in text, "the model and the training of clients and student are one object each"
    path.write_text(text)
    config = configuration.load(path, ("student.training.epochs=7", "student.model.layers=[1]"))
    assert (config.student.training.epochs, config.student.model.layers) == (7, (1,))
    assert config.clients.training.epochs == tiny_settings["clients"]["training"]["epochs"]
    assert config.clients.models[0].layers is None
    content = {"name": "s", "base": "tied.yaml", "cases": {"a": {"student.training.epochs": 7}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    (cell,) = study.cells(study.load(tmp_path / "study.yaml", ("seeds=[0]",)))
    assert cell.config.clients.training.epochs == tiny_settings["clients"]["training"]["epochs"]


class TestStudies:
    """Grids of runs."""

    @pytest.fixture
    def written(self, tiny_settings, tmp_path):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_settings | {"rounds": 1, "baselines": []}))
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"name": "s", "base": "base.yaml", "seeds": [0]}))
        return path

    def test_what_was_run_with_another_base_is_not_done(self, written, tmp_path):
        out = tmp_path / "out"
        (cell,) = study.cells(study.load(written))
        assert study.sweep(study.load(written), out) == {}
        assert study.sweep(study.load(written), out) == {}
        base = tmp_path / "base.yaml"
        base.write_text(base.read_text().replace("rounds: 1", "rounds: 2"))
        with pytest.raises(RunError, match=rf"{cell.name} was run with another rounds; choose another --out"):
            study.sweep(study.load(written), out)
        with pytest.raises(RunError, match="was run with another rounds"):
            study.collect(out)

    def test_a_case_may_name_its_settings_in_groups(self, written):
        content = yaml.safe_load(written.read_text())
        content["settings"] = {"aggregation.sharpen": 2}
        content["cases"] = {"plain": {}, "mine": {"aggregation": {"rule": "median"}}}
        written.write_text(yaml.safe_dump(content))
        found = {cell.labels["case"]: cell.config.aggregation for cell in study.cells(study.load(written))}
        assert found["mine"].sharpen == found["plain"].sharpen == 2
        assert found["mine"].rule.kind == "median"

    def test_where_it_cannot_be_written(self, written, tmp_path):
        (tmp_path / "file").write_text("")
        done = cli("sweep", written, "--out", tmp_path / "file/out")
        assert done.exit_code == 2
        assert "cannot write" in done.output
        assert cli("sweep", written, "--jobs", 0).exit_code == 2


def test_what_a_federation_costs_is_not_known_at_the_server(tiny_settings):
    partition = {"kind": "remote", "names": ["north", "south"]}
    raw = tiny_settings | {"baselines": [], "data": {**tiny_settings["data"], "partition": partition}}
    raw["data"].pop("private")
    with pytest.raises(ConfigError, match="remote: cannot estimate the cost: it depends on the clients"):
        plan.plan(parse(raw))


def test_another_student_that_cannot_be_built_leaves_nothing_behind(tiny_settings, tmp_path):
    experiment.run(parse(tiny_settings | {"rounds": 1, "baselines": []}), tmp_path / "run")
    with pytest.raises(ModelError, match=r"student\.model\.layers names layer 9"):
        rerun.distill(tmp_path / "run", tmp_path / "again", ("student.model.layers=[9]",))
    assert not (tmp_path / "again").exists()
    rerun.distill(tmp_path / "run", tmp_path / "again", ("student.model.layers=[1]",))
    with pytest.raises(RunError, match="already exists; choose another --out"):
        rerun.distill(tmp_path / "run", tmp_path / "again")


class TestTexts:
    """Files of them."""

    @pytest.fixture
    def read(self, tmp_path):
        from feddistill.config.data import FileSource
        from feddistill.data.sources import read

        def run(*lines):
            (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
            return read(FileSource(path=tmp_path / "texts.jsonl"), "data.source")

        return run

    def test_the_object_that_is_none_is_named(self, read):
        good = '{"text": "a b", "label": "x"}'
        with pytest.raises(DataError, match=r"texts\.jsonl is malformed: object 3: Expecting .* character 2"):
            read(good, good, "{text}", good)

    def test_half_a_character_is_no_text(self, read):
        with pytest.raises(DataError, match="row 1 has half a character"):
            read('{"text": "a 🎈", "label": "x"}', '{"text": "a \\ud800 b", "label": "x"}')

    def test_public_texts_of_which_no_label_is_known_may_have_any(self, tiny_settings):
        raw = tiny_settings | {"baselines": []}
        source = {"kind": "embedded", "name": "sotu_eras"}
        raw["data"] = {**raw["data"], "proxy": {"size": 50, "labelled": 0, "source": source}}
        config = parse(raw)
        splits = data.load(config.data, config.seed)
        assert len(splits.proxy) == 50
        assert not splits.proxy.known.any()
        config = configuration.parse(
            {**raw, "data": {**raw["data"], "proxy": {**raw["data"]["proxy"], "labelled": 5}}}
        )
        with pytest.raises(DataError, match=r"data\.proxy: row 0 has label"):
            data.load(config.data, config.seed)

    def test_a_question_longer_than_a_page_is_found_before_a_run(self, tmp_path):
        rows = question_fixtures.rows(60)
        path = question_fixtures.write(tmp_path / "questions.jsonl", rows)
        long = question_fixtures.rows(12, seed=1)
        long[5]["question"] = "What " * 90
        test = question_fixtures.write(tmp_path / "test.jsonl", long)
        source = question_fixtures.source
        raw = {
            "task": "question_answering",
            "rounds": 1,
            "data": {
                "source": source(path),
                "private": {"size": 30},
                "proxy": {"size": 15, "labelled": 5},
                "validation": {"size": 10},
                "test": {"source": source(test)},
                "partition": {"kind": "iid", "clients": 2},
            },
            "clients": {"models": [question_fixtures.BERT]},
            "student": {"model": question_fixtures.BERT},
            "baselines": [],
        }
        with pytest.raises(ModelError, match="leaves no room"):
            experiment.check(parse(raw))


def test_an_attack_names_clients_and_classes_that_there_are(tiny_settings):
    with pytest.raises(ConfigError, match=r"simulate\.attack"):
        parse(tiny_settings | {"simulate": {"attack": {"kind": "second_best", "clients": -1}}})
    attack = {"kind": "targeted", "clients": 1, "source": 0, "target": 10}
    with pytest.raises(ConfigError, match="must be below the 10 classes"):
        experiment.check(parse(tiny_settings | {"simulate": {"attack": attack}}), build=False)
    with pytest.raises(ConfigError, match=r"aggregation\.rule\.penalties"):
        parse(tiny_settings | {"aggregation": {"rule": {"kind": "stacked", "penalties": [-1]}}})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.partition.clients=8", r"data\.partition has no kind; .* data\.partition\.kind="),
        ("aggregation.rule.weights=size", r"aggregation\.rule has no kind"),
    ],
)
def test_a_setting_of_a_kind_that_the_file_does_not_name(override, message, tmp_path):
    (tmp_path / "empty.yaml").write_text("name: empty\n")
    with pytest.raises(ConfigError, match=message):
        configuration.load(tmp_path / "empty.yaml", (override,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sourc: {kind: files, path: a.csv}", r"sourc is not a setting; did you mean source\?"),
        ("source: {kind: files, pth: a.csv}", r"source\.pth is not a setting; did you mean source\.path\?"),
        ("- 1", "is not|mapping|dictionary"),
    ],
)
def test_what_an_institution_has_misspelt_is_named(text, message, tmp_path):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        institution.load(tmp_path / "data.yaml")


def test_a_deployment_needs_a_folder_and_ports(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        deployment.write(tmp_path / "file/federation", ["a"], "127.0.0.1")
    options = ("--host", "127.0.0.1", "--client", "a")
    for port in ("--port=-5", "--runtime-port=700000"):
        assert cli("deploy", "init", tmp_path / "federation", *options, port).exit_code == 2
    assert not (tmp_path / "federation").exists()


def test_texts_are_prompted_or_asked_about(tmp_path):
    (tmp_path / "texts.csv").write_text("text,label\na,b\n")
    done = cli(
        *("evaluate", tmp_path, "--texts", tmp_path / "texts.csv"),
        *("--prompt-column", "label", "--question-column", "label"),
    )
    assert done.exit_code == 2, json.dumps(done.output)
    assert not isinstance(done.exception, ValueError)
