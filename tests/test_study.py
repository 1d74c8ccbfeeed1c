"""Studies: which runs a file means, that they go on after a kill, and what is made of their results."""

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from feddistill import report
from feddistill.config.tasks import TASKS
from feddistill.errors import ConfigError, RunError
from feddistill.report import comparison, studies
from feddistill.runs import experiment, study


@pytest.fixture
def written(tiny_settings, tmp_path):
    """A study of four runs of one round, and its file."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({**tiny_settings, "rounds": 1, "baselines": ["public_only", "fedavg"]}))
    path = tmp_path / "study.yaml"
    content = {
        "name": "tiny",
        "question": "Does alpha matter?",
        "base": "base.yaml",
        "grid": {"data.partition.alpha": [0.5, 100]},
        "seeds": [0, 1],
        "target": 0.05,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_grid_is_every_combination(written):
    content = yaml.safe_load(written.read_text())
    content["grid"]["aggregation.rule"] = ["median", {"kind": "trimmed_mean", "trim": 1}]
    content["cases"] = {"warm": {"distill.temperature": 4}, "cold": {"distill.temperature": 1}}
    written.write_text(yaml.safe_dump(content, sort_keys=False))
    cells = study.cells(study.load(written))
    assert len(cells) == 2 * 2 * 2 * 2
    assert cells[0].name == "alpha=0.5_rule=median_case=warm_seed=0"
    assert cells[-1].config.aggregation.rule.kind == "trimmed_mean"
    assert cells[-1].config.distill.temperature == 1
    assert cells[-1].config.seed == 1
    assert len({cell.name for cell in cells}) == len(cells)


def test_names_are_as_short_as_they_can_be(written):
    content = yaml.safe_load(written.read_text())
    content["grid"] = {"clients.training.epochs": [1], "student.training.epochs": [1]}
    written.write_text(yaml.safe_dump(content, sort_keys=False))
    first = study.cells(study.load(written))[0]
    assert first.name == "clients.training.epochs=1_student.training.epochs=1_seed=0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"data.partition.alhpa": [1]}}, r"did you mean data\.partition\.alpha"),
        ({"grid": {"rounds": [0]}}, r"cell rounds=0_seed=0: rounds: input should be greater"),
        ({"sedes": [1]}, "sedes is not a setting; known: name, question"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"grid": {"rounds": [1, 1]}}, "two cells are both called rounds=1_seed=0"),
        ({"base": "nowhere.yaml"}, r"cannot read .*nowhere\.yaml"),
        ({"grid": [1]}, "must be a mapping"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(change, message, written):
    written.write_text(yaml.safe_dump({**yaml.safe_load(written.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        study.load(written)


def test_a_study_can_be_cut_down_on_the_command_line(written):
    chosen = study.load(written, ("seeds=[0]", "grid.data.partition.alpha=[100]"))
    assert [cell.name for cell in study.cells(chosen)] == ["alpha=100_seed=0"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return {"out": tmp_path_factory.mktemp("study") / "tiny"}


@pytest.fixture
def swept(done, written):
    if "study" not in done:
        done["study"] = study.load(written)
        assert study.sweep(done["study"], done["out"], after=report.write) == {}
        done["page"] = studies.write(done["out"]).read_text()
    return done


def test_every_cell_is_a_run_of_its_own(swept):
    for cell in study.cells(swept["study"]):
        result = json.loads((swept["out"] / "cells" / cell.name / "result.json").read_text())
        assert result["status"] == "complete"
        assert (swept["out"] / "cells" / cell.name / "report.html").is_file()


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_are_means_over_seeds(swept):
    summary, runs = rows(swept["out"] / "summary.csv"), rows(swept["out"] / "runs.csv")
    assert {r["who"] for r in summary} == {
        *("student", "clients_before", "clients_after", "public_only", "fedavg")
    }
    for row in summary:
        of = [float(r["accuracy"]) for r in runs if (r["alpha"], r["who"]) == (row["alpha"], row["who"])]
        assert len(of) == int(row["seeds"]) == 2
        assert float(row["accuracy"]) == pytest.approx(sum(of) / 2, abs=1e-6)
        assert float(row["accuracy_std"]) == pytest.approx(abs(of[0] - of[1]) / 2**0.5, abs=1e-6)
    fedavg, student = (next(r for r in summary if r["who"] == who) for who in ("fedavg", "student"))
    assert int(fedavg["uplink"]) > int(student["uplink"])
    assert float(fedavg["target_round"]) == 1  # there is one round, and the target is chance
    assert int(float(fedavg["target_bytes"])) == int(fedavg["uplink"])
    assert (swept["out"] / "table.tex").read_text().count(r"\\") == 1 + len(summary)


def test_values_reach_the_table_of_latex_as_they_are_said():
    row = {"rule": {"kind": "krum", "f": 1}, "texts": r"a_b~{c}\^$", "who": "student"}
    said = studies.latex(
        [{**row, "accuracy": 0.5, "accuracy_std": 0.01, "uplink": 10}], TASKS["classification"]
    )
    line = said.splitlines()[4]
    assert line.startswith(r"krum, f 1 & a\_b\textasciitilde{}\{c\}\textbackslash{}\textasciicircum{}\$ & ")
    assert r"50.0 $\pm$ 1.0" in line


def test_the_page_needs_nothing_else(swept):
    page = swept["page"]
    assert page.count("<svg") == 4
    assert "Does alpha matter?" in page
    assert "://" not in page.replace("http://www.w3.org/", "")
    assert len(list((swept["out"] / "figures").glob("*.png"))) == 4
    for path in (swept["out"] / "figures").glob("*.svg"):
        ElementTree.parse(path)
    for name in re.findall(r'href="(cells/[^"]+)"', page):
        assert (swept["out"] / name).is_file()


def test_robustness_is_the_swing_over_the_first_axis(swept):
    summary = rows(swept["out"] / "summary.csv")
    for row in summary:
        row["accuracy"] = float(row["accuracy"])
    found = {row["who"]: row for row in studies.robustness(summary, TASKS["classification"])}
    of = {row["alpha"]: row["accuracy"] for row in summary if row["who"] == "fedavg"}
    assert found["FedAvg"]["spread"] == pytest.approx(max(of.values()) - min(of.values()))
    assert of[found["FedAvg"]["least_at"]] == min(of.values())
    assert "Robustness" in swept["page"]
    assert (
        studies.robustness([row for row in summary if row["alpha"] == "100"], TASKS["classification"]) == []
    )


def test_values_that_are_no_numbers_are_bars(swept):
    _, found = study.collect(swept["out"])
    cases = [({"case": f"alpha {labels['alpha']}"}, results) for labels, results in study.groups(found)]
    drawn = studies.draw(cases)["grid"].svg
    assert "alpha 0.5" in drawn
    mean = 100 * sum(r["metrics"]["student"]["accuracy"] for r in cases[0][1]) / 2
    assert f"{mean:.1f}" in drawn


def test_every_cell_has_its_first_seed_before_any_has_its_second(written, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(experiment, "run", lambda config, out, **more: asked.append(config.seed))
    study.sweep(study.load(written), tmp_path / "out")
    assert asked == [0, 0, 1, 1]


def test_what_is_done_is_not_done_again(swept, monkeypatch):
    monkeypatch.setattr(experiment, "run", None)
    assert study.sweep(swept["study"], swept["out"]) == {}


def test_a_study_goes_on_after_a_cell_that_failed(swept, written, tmp_path, monkeypatch):
    def failing(config, out, **more):
        if "seed=1" in out.name:
            raise RunError("cut")
        shutil.copytree(swept["out"] / "cells" / out.name, out)

    chosen = study.load(written, ("grid.data.partition.alpha=[0.5]",))
    monkeypatch.setattr(experiment, "run", failing)
    assert study.sweep(chosen, tmp_path / "out") == {"alpha=0.5_seed=1": "cut"}
    assert "1 runs of these cells are not complete" in studies.write(tmp_path / "out").read_text()
    monkeypatch.undo()
    assert study.sweep(chosen, tmp_path / "out") == {}
    result = "cells/alpha=0.5_seed=1/result.json"
    whole, again = (json.loads((out / result).read_text()) for out in (swept["out"], tmp_path / "out"))
    assert again["metrics"] == whole["metrics"]


def test_another_study_in_the_way_is_left_alone(swept, written, tmp_path):
    with pytest.raises(RunError, match="holds another study"):
        study.sweep(study.load(written, ("seeds=[7]",)), swept["out"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="is not a study"):
        study.sweep(swept["study"], tmp_path / "mine")


def test_runs_stand_side_by_side(swept):
    cells = [swept["out"] / "cells" / name for name in ("alpha=0.5_seed=0", "alpha=100_seed=1")]
    one, other = comparison.side_by_side(cells)
    assert one.settings == {"seed": 0, "data.partition.alpha": 0.5}
    assert other.settings == {"seed": 1, "data.partition.alpha": 100.0}
    assert set(one.figures) == set(other.figures)
    with pytest.raises(RunError, match="cannot read"):
        comparison.side_by_side([swept["out"]])
