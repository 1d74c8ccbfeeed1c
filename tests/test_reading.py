"""Answers that stand in passages: runs of models that point at them, their release, benchmarks of them."""

import json
import re
from pathlib import Path

import hub_fixtures as hub
import numpy as np
import pytest
import question_fixtures as made
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedTokenizerFast,
)

from feddistill import metrics
from feddistill.benchmarks import extraction
from feddistill.cli import main
from feddistill.client.client import ClientGroup
from feddistill.config import parse
from feddistill.config.data import FileSource, PresetSource
from feddistill.data import benchmark
from feddistill.data.sources import read
from feddistill.errors import ConfigError, DataError, ModelError
from feddistill.modelio.passages import likeliest
from feddistill.progress import NoProgress
from feddistill.runs import experiment, plan, trained_models
from feddistill.server.rounds import request
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.session import Session


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made.write(tmp_path_factory.mktemp("questions") / "all.jsonl", made.rows(120))


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    baselines = ["public_only", "local_only", "centralized", "fedavg"]
    experiment.run(parse(made.settings(file, baselines=baselines)), out)
    return out


def feddistill(*arguments):
    done = CliRunner().invoke(main, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def figures_of(*arguments):
    done = feddistill("evaluate", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def session_of(config, where):
    return Session(config, experiment.check(config), RunDirectory.create(where, ""), NoProgress())


def test_clients_of_two_tokenizers_answer_and_a_student_learns(run):
    result = json.loads((run / "result.json").read_text())
    assert result["task"] == "question_answering"
    metrics = result["metrics"]
    for who in ("student", "public_only", "centralized", "fedavg"):
        assert 0 <= metrics[who]["exact_match"] <= metrics[who]["f1"] <= 1
    rows = 2 * 24
    assert result["bytes"]["uplink"] < 2 * 2 * (rows * 40 + 4000)


def test_a_run_of_questions_is_verified_and_reported(run):
    assert feddistill("verify", run).exit_code == 0
    done = feddistill("report", run)
    assert done.exit_code == 0
    page = (run / "report.html").read_text()
    assert "exact match" in page
    assert "F1 on the test set" in page


def test_an_interrupted_run_goes_on_to_the_same_student(run, file, tmp_path):
    whole = json.loads((run / "result.json").read_text())
    again = tmp_path / "again"
    settings = parse(made.settings(file))

    class Stopped(Exception):
        pass

    class Stops(NoProgress):
        def step(self, label):
            if label.startswith("round 2: aggregate"):
                raise Stopped
            return super().step(label)

    with pytest.raises(Stopped):
        experiment.run(settings, again, progress=Stops())
    resumed = experiment.run(settings, again, resume=True)
    assert set(resumed["metrics"]) == {"student", "clients"}
    assert resumed["metrics"].items() <= whole["metrics"].items()


def test_shards_of_an_answer_are_those_of_the_whole(file, tmp_path):
    session = session_of(parse(made.settings(file)), tmp_path / "r")
    learner = ClientGroup(session).learner(1)
    spec = request(session, 1, quorum=2, previous="")
    assert (spec.positions, spec.codec, spec.k) == (48, "topk", 16)
    passages = [session.splits.proxy.question(row)[1] for row in range(24)]
    assert spec.vocab_size == max(map(len, passages)) + 1
    whole = learner.compressed(spec, 0, 0, spec.positions)
    for start, stop in ((0, 7), (7, 8), (8, 21), (21, 48)):
        part = learner.compressed(spec, 0, start, stop)
        assert np.array_equal(part.ids, whole.ids[start:stop])
        assert np.array_equal(part.codes, whole.codes[start:stop])
    session.run.close()


def test_the_server_is_told_no_answers_but_those_it_has(file, tmp_path):
    session = session_of(parse(made.settings(file, labelled=5)), tmp_path / "r")
    proxy = session.splits.proxy
    assert int(proxy.known.sum()) == 5
    assert session.query.labels.shape == (48,)
    known = (session.query.labels >= 0).view(24, 2)
    assert known.all(1).sum() == 5
    assert torch.equal(known[:, 0], torch.from_numpy(proxy.known))
    for row in np.flatnonzero(proxy.known):
        begin, end = session.query.labels[2 * row : 2 * row + 2].tolist()
        _, passage = proxy.question(int(row))
        ((a, b),) = proxy.answers[row]
        assert passage[begin - 1 : end] == passage[a:b]
    session.run.close()


def test_a_plan_foretells_what_a_run_takes(run, file):
    settings = parse(made.settings(file, baselines=["public_only", "local_only", "centralized", "fedavg"]))
    foretold = plan.estimate(experiment.resolve(settings), experiment.check(settings))
    result = json.loads((run / "result.json").read_text())
    for phase, operations in result["flops"].items():
        if operations:
            assert foretold["flops"][phase] == pytest.approx(operations, rel=0.05), phase
    sent = foretold["bytes"]["codecs"][foretold["bytes"]["chosen"]]["all_rounds_and_clients"]
    assert sent == pytest.approx(result["bytes"]["uplink"], rel=0.02)


def test_what_is_checked_and_foretold_is_said_in_words_of_the_task(file, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made.settings(file)))
    checked = feddistill("config", "check", tmp_path / "run.yaml").stdout
    assert re.search(r"^what +28 texts$", checked, re.MULTILINE)
    assert "no labels, so no skew of them; largest client 1.1 times the smallest" in checked
    foretold = " ".join(feddistill("plan", tmp_path / "run.yaml").stdout.split())
    assert "24 proxy texts, 48 rows (one a start or end)" in foretold
    assert "characters; the proxy set is" in foretold


@pytest.mark.parametrize(("target", "unanswerable"), [("hard", True), ("soft", False)])
def test_every_way_to_learn_from_a_teacher_runs(tmp_path, target, unanswerable):
    file = made.write(tmp_path / "all.jsonl", made.rows(60, unanswerable=unanswerable))
    changes = {
        "clients": {
            "models": [made.BERT, {**made.BERT, "layers": [0]}],
            "training": {"epochs": 1},
            "codistillation": {"target": target, "examples": 5},
        },
        "question_answering": {"allow_no_answer": unanswerable},
        "distill": {"teacher_history": 1},
        "payload": {"shard_mib": 0.0005},
        "aggregation": {"rule": {"kind": "mean_probs", "weights": "verified"}},
    }
    config = parse(made.settings(file, sizes=(30, 12, 8, 8), labelled=4, **changes))
    assert config.clients.codistillation.target == target
    result = experiment.run(config, tmp_path / "run")
    assert result["status"] == "complete"
    sent = list((tmp_path / "run").glob("rounds/002/payloads/what.*.safetensors"))
    assert len(sent) > 1, "in shards"


def test_adapters_are_trained_in_the_place_of_layers(file, tmp_path):
    pytest.importorskip("peft", reason="pip install 'feddistill[lora]'")
    model = {**made.BERT, "lora": {"rank": 2}}
    clients = {"models": [model], "training": {"epochs": 1}}
    changes = {"rounds": 1, "clients": clients, "keep_checkpoints": "all"}
    experiment.run(parse(made.settings(file, sizes=(30, 12, 8, 8), **changes)), tmp_path / "run")
    weights = load_file(next((tmp_path / "run").glob("alone/001/*.safetensors")))
    trained = {name for name in weights if "lora_B" in name and weights[name].any()}
    assert trained, "which begin as zeros"


def test_what_is_exported_answers_as_the_student_does(run, tmp_path, capsys):
    folder = tmp_path / "student"
    assert feddistill("export", run, "--out", folder).exit_code == 0
    body = (folder / "README.md").read_text()
    assert "pipeline_tag: question-answering" in body
    assert "points at the answer" in body
    student = trained_models.load(run)
    theirs = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("What did Anna leave?", "Anna left a blue hat.", return_tensors="pt")
    assert "token_type_ids" in batch  # BERT reads them
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs(**batch).start_logits, student.model(**batch).start_logits, rtol=0, atol=0
        )
    code = re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)[1]
    exec(compile(code.replace('folder = "."', f"folder = {str(folder)!r}"), "card", "exec"), {})
    said = capsys.readouterr().out.strip()
    assert said
    assert said in "The cat sits on the mat."
    squad_ = hub.squad_1(tmp_path / "squad")
    found = figures_of(run, "--benchmark", "squad", "--path", squad_)
    assert figures_of(folder, "--benchmark", "squad", "--path", squad_) == {**found, "model": str(folder)}


def test_a_run_is_evaluated_on_questions_of_ones_own(run, tmp_path):
    own = json.loads((run / "result.json").read_text())["metrics"]["student"]
    test = experiment.check(experiment.stored_config(run), build=False).test
    rows = []
    for row in range(len(test)):
        question, passage = test.question(row)
        ((a, b),) = test.answers[row]
        answers = {"text": [passage[a:b]], "answer_start": [a]}
        rows.append({"said": passage, "asked": question, "answers": answers})
    given = made.write(tmp_path / "mine.jsonl", rows)
    columns = ("--text-column", "said", "--question-column", "asked")
    found = figures_of(run, "--texts", given, *columns)
    assert found["examples"] == len(test)
    assert (found["f1"], found["exact_match"]) == (own["f1"], own["exact_match"])
    done = feddistill("evaluate", run, "--texts", given, "--text-column", "said")
    assert done.exit_code == 2
    assert "question_column names their column" in done.stderr


@pytest.fixture(scope="module")
def reader(tiny_model, tmp_path_factory):
    """A model for question answering with random weights, as ``save_pretrained`` leaves it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("reader")
    backend = AutoTokenizer.from_pretrained(tiny_model).backend_tokenizer
    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, model_max_length=64, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.5, **made.SMALL
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    return folder


def by_hand(folder, question, passage, *, hard):
    """One window at a time, without padding, every span tried."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    asked, read = (
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in (question, passage)
    )
    room = 64 - len(asked["input_ids"]) - 3
    step = room - min(128, room // 2)
    best, none, at = (-1e30, ""), 1e30, 0
    while True:
        ids, edges = read["input_ids"][at : at + room], read["offset_mapping"][at : at + room]
        whole = [2, *asked["input_ids"], 3, *ids, 3]
        types = [0] * (len(asked["input_ids"]) + 2) + [1] * (len(ids) + 1)
        with torch.inference_mode():
            said = model(input_ids=torch.tensor([whole]), token_type_ids=torch.tensor([types]))
        start, end = said.start_logits[0].double(), said.end_logits[0].double()
        first = len(asked["input_ids"]) + 2
        for i in range(len(ids)):
            for j in range(i, min(i + 30, len(ids))):
                score = float(start[first + i] + end[first + j])
                if score > best[0] + 1e-9:
                    best = score, passage[edges[i][0] : edges[j][1]]
        none = min(none, float(start[0] + end[0]))
        if at + room >= len(read["input_ids"]):
            break
        at += step
    return "" if hard and best[0] < none else best[1]


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_points_at_its_answers_in_windows(reader, tmp_path, version):
    folder = hub.squad(tmp_path, version)
    found = figures_of(reader, "--benchmark", "squad_v2" if version == 2 else "squad", "--path", folder)
    rows = [(question, golds) for _, question, golds in hub.SQUAD if golds or version == 2]
    long = " ".join([hub.PASSAGE] * 3)
    given = [by_hand(reader, question, hub.PASSAGE, hard=version == 2) for question, _ in rows]
    right = [golds for _, golds in rows]
    wanted = metrics.squad(given, right, no_answer=version == 2)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-5)
    student = trained_models.load(reader)
    questions = [question for question, _ in rows]
    said = extraction.extract(
        student, questions, [long] * len(rows), lambda *_: None, unanswerable=version == 2
    )
    assert said == [by_hand(reader, question, long, hard=version == 2) for question in questions]


def test_a_benchmark_can_be_what_a_run_learns_from(tmp_path):
    rows = made.rows(10, unanswerable=True)
    folder = hub.write(tmp_path, {"squad_v2": {"validation": rows}})
    table = read(PresetSource(name="squad_v2", split="validation", path=folder), "data.source")
    assert table.questions
    assert set(table.sources) == {"where", "what"}
    for text, start, spans, row in zip(table.texts, table.starts, table.answers, rows, strict=True):
        assert (text[:start].strip(), text[start:]) == (row["question"], row["context"])
        assert [text[start:][a:b] for a, b in spans] == row["answers"]["text"]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_answers_are_read_from_every_kind_of_file(tmp_path, ending):
    rows, path = made.rows(6), tmp_path / f"q.{ending}"
    if ending == "jsonl":
        made.write(path, rows)
    else:
        import pandas

        frame = pandas.DataFrame(rows)
        frame.to_parquet(path) if ending == "parquet" else path.write_text(json.dumps(rows))
    source = FileSource.model_validate({**made.source(path), "kind": "files"})
    table = read(source, "data.source")
    for row, text, start, spans in zip(rows, table.texts, table.starts, table.answers, strict=True):
        assert [text[start:][a:b] for a, b in spans] == row["answers"]["text"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"text": ["hat"], "answer_start": [1]}, "row 0: its answer 'hat' is not at character 1"),
        ({"text": ["hat"], "answer_start": []}, "row 0 has 1 answers, and not as many answer_start"),
        ({"text": "hat", "answer_start": [7]}, "row 0: its answer 'h'|row 0 has"),
        ("hat", "row 0 has no 'answers' in SQuAD's form"),
        ({"text": [" "], "answer_start": [1]}, "is not at character"),
        ({"text": ["hat"], "answer_start": ["7"]}, "is not at character 7"),
    ],
)
def test_answers_that_are_not_there_are_refused(answers, words):
    with pytest.raises(DataError, match=words):
        benchmark.answers([answers], ["a blue hat"], "data.source")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"baselines": ["fedmd"]},
            "baselines: fedmd is for classification, not for task = question_answering",
        ),
        ({"payload": {"codec": "dense"}}, "payload.codec = dense is for classification"),
        (
            {"aggregation": {"rule": {"kind": "mean_probs", "weights": "class_counts"}}},
            "weights = class_counts is for classification, not for task = question_answering",
        ),
        (
            {"student": {"model": {"freeze_embeddings": True, "freeze_layers": 1, "frozen_cache_mb": 9}}},
            "student.model.frozen_cache_mb is not for task = question_answering",
        ),
        (
            {"clients": {"models": [{"source": {"kind": "callable", "name": "a:b"}}]}},
            "clients.models.0.source.kind = callable is not for task = question_answering",
        ),
        ({"simulate": {"attack": {"kind": "second_best", "clients": 1}}}, "simulate.attack is for classific"),
        (
            {"aggregation": {"rule": {"kind": "mean_probs", "weights": "verified"}}, "labelled": 0},
            "needs labelled proxy texts, but data.proxy.labelled is 0",
        ),
    ],
)
def test_what_is_of_other_tasks_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        parse(made.settings(Path("x.jsonl"), **changes))


def test_questions_without_answers_need_a_setting(tmp_path):
    file = made.write(tmp_path / "all.jsonl", made.rows(60, unanswerable=True))
    config = parse(made.settings(file, sizes=(30, 12, 8, 8)))
    with pytest.raises(
        ConfigError, match=r"has no answer, which question_answering\.allow_no_answer: true allows"
    ):
        experiment.run(config, tmp_path / "run")
    bare = {**made.BERT, "source": {**made.BERT["source"], "tokenizer": made.TRAINED}}
    clients = {"models": [bare]}
    config = parse(
        made.settings(
            file, sizes=(30, 12, 8, 8), clients=clients, question_answering={"allow_no_answer": True}
        )
    )
    with pytest.raises(ModelError, match=r"clients\.models\.0: its tokenizer has no cls token"):
        experiment.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_texts_that_are_no_questions_are_refused(file, tmp_path):
    raw = made.settings(file)
    plain = {**raw["data"]["source"], "question_column": None}
    with pytest.raises(DataError, match=r"data\.source: task = question_answering needs questions"):
        experiment.run(parse({**raw, "data": {**raw["data"], "source": plain}}), tmp_path / "run")
    other = {**raw["data"]["source"], "answers_column": "golds"}
    with pytest.raises(DataError, match=r"data\.source: has no column of answers; answers_column names it"):
        experiment.run(parse({**raw, "data": {**raw["data"], "source": other}}), tmp_path / "run")
    both = {**plain, "prompt_column": "a", "question_column": "b"}
    with pytest.raises(ConfigError, match="set prompt_column or question_column, not both"):
        parse({**raw, "data": {**raw["data"], "source": both}})


def test_a_question_that_is_too_long_is_named(file, tmp_path):
    short = {**made.BERT, "max_tokens": 8}
    config = parse(made.settings(file, clients={"models": [short]}))
    with pytest.raises(ModelError, match=r"clients\.models\.0 reads 8 tokens; a question of \d+ leaves no"):
        experiment.run(config, tmp_path / "run")


def test_the_metrics_are_those_of_the_spans(file, tmp_path):
    session = session_of(parse(made.settings(file)), tmp_path / "r")
    learner = ClientGroup(session).learner(0)
    test = session.splits.test
    found = learner.metrics(test)
    given, golds = [], []
    for row, (window, logits) in enumerate(
        zip(learner.windows(test), learner._logits(learner.windows(test), None), strict=True)
    ):
        _, first, last = likeliest(*logits, window, 30)
        passage = test.question(row)[1]
        given.append(passage[window.starts[first] : window.ends[last]])
        golds.append([passage[a:b] for a, b in test.answers[row]])
    assert found["f1"] == pytest.approx(metrics.squad(given, golds)["f1"] / 100, abs=1e-6)
    session.run.close()
