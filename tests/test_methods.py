"""The methods that the student is compared with: what they compute, what they send, that they go on."""

import numpy as np
import pytest
import torch
from plan_fixtures import assert_foretold
from safetensors.torch import load_file

from feddistill import payload
from feddistill.config import parse
from feddistill.config.training import DistillConfig
from feddistill.errors import RunError
from feddistill.federation import answer_files, encoding
from feddistill.methods.averaging import averaged
from feddistill.methods.fedfed import sensitivity, share
from feddistill.modelio import inference
from feddistill.progress import NoProgress
from feddistill.runs import experiment
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import labels_of
from feddistill.tasks.session import Session
from feddistill.training import example_loss
from feddistill.types import NO_LABEL

METHODS = ("centralized_distillation", "fedavg", "feddf", "fedlora", "fedmd", "fedmkt", "fedfed")


def settings(tiny_settings, *baselines, **changes):
    return parse({**tiny_settings, "baselines": list(baselines), **changes})


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture
def finished(runs, tiny_settings, tmp_path_factory):
    if not runs:
        out = tmp_path_factory.mktemp("methods") / "run"
        config = settings(tiny_settings, *METHODS, keep_checkpoints="all")
        runs["result"], runs["out"] = experiment.run(config, out), out
    return runs


@pytest.mark.parametrize("name", METHODS)
def test_has_figures_costs_and_a_line_for_each_round(name, finished):
    result = finished["result"]
    figures = result["metrics"][name]
    figures = figures["mean"] if name == "fedmd" else figures
    assert 0 <= figures["accuracy"] <= 1
    assert result["flops"][f"baseline_{name}"] > 0
    assert result["seconds"][f"baseline_{name}"] > 0
    rows = [row for row in result["by_round"] if row["series"].startswith(name)]
    assert {row["round"] for row in rows} == {1, 2}


def test_bytes_and_operations_are_foretold(finished):
    assert_foretold(settings_of(finished), finished["result"])


def test_what_a_client_alone_shares_with_the_federation_is_told(tiny_settings, tmp_path):
    clients = {**tiny_settings["clients"], "codistillation": {"enabled": False}}
    config = settings(tiny_settings, "local_only", clients=clients, rounds=3)
    flops = (result := experiment.run(config, tmp_path / "run"))["flops"]
    shared = result["flops_shared"]["baseline_local_only"]
    # Three equal segments, of which the first is the federation's own.
    assert shared == pytest.approx(flops["baseline_local_only"] / 2, rel=0.05)
    assert flops["clients_train"] == pytest.approx(3 * shared, rel=0.05)


def test_fedmkt_asks_the_student_from_the_second_round_on(finished):
    inner = finished["out"] / "baselines/fedmkt"
    assert not (inner / "records/rounds/001/before.json").exists()
    specs = payload.parse_spec((inner / "rounds/002/spec.json").read_bytes())
    run = RunDirectory.open(finished["out"]).within("baselines/fedmkt")
    try:
        places = [(f"rounds/002/payloads/{name}", specs) for name in specs.clients]
        places.append(("rounds/002/before", encoding.feedback_spec(specs)))
        said = []
        for place, spec in places:
            stored = answer_files.StoredAnswer(run, place, spec)
            stored.admit()
            said.append(answer_files.answer_reader(encoding.expand, stored)(0, spec.positions))
        teacher = load_file(inner / "rounds/002/teacher.safetensors")["log_probs"]
    finally:
        run.close()
    config = settings_of(finished)
    splits = experiment.check(config, build=False)
    rows = np.flatnonzero(splits.proxy.known)
    truth = torch.stack(said)[:, rows, splits.proxy.labels[rows]]
    best = truth.argmax(0)
    assert (best == len(said) - 1).any(), "the student is the best somewhere"
    wanted = torch.stack(said)[best, rows]
    torch.testing.assert_close(teacher[rows], wanted, rtol=1e-4, atol=1e-4)


def settings_of(finished):
    return experiment.stored_config(finished["out"])


def test_what_is_sent_is_counted(finished):
    sent = finished["result"]["bytes"]
    for name in ("fedavg", "feddf"):
        assert sent["baselines"][name]["uplink"] == sent["fedavg_uplink_same_rounds"]
        assert sent["baselines"][name]["downlink"] == sent["fedavg_uplink_same_rounds"]
    scores = 4 * 120 * 10  # bytes a score, proxy texts, classes
    assert sent["baselines"]["fedmd"] == {"uplink": 2 * 3 * scores, "downlink": 2 * 3 * scores}
    assert sent["baselines"]["centralized_distillation"] == {"uplink": 0, "downlink": 0}


def test_a_run_that_is_cut_goes_on_to_the_same_figures(finished, tiny_settings, tmp_path, monkeypatch):
    """Cut in the second round of each method in turn."""
    names = ("fedavg", "fedmd", "fedmkt")
    config, out = settings(tiny_settings, *names), tmp_path / "run"
    commit = RunDirectory.commit
    for name in names:

        def cut(self, step, content, files=(), name=name):
            done = commit(self, step, content, files)
            if f"baselines/{name}/" in str(self.path(step)) and "/002" in step:
                raise RunError(f"cut in {name}")
            return done

        monkeypatch.setattr(RunDirectory, "commit", cut)
        with pytest.raises(RunError, match=f"cut in {name}"):
            experiment.run(config, out, resume=out.exists())
    monkeypatch.undo()
    result = experiment.run(config, out, resume=True)
    assert all(result["metrics"][name] == finished["result"]["metrics"][name] for name in names)


def test_averages_are_weighted_by_examples():
    states = [{"w": torch.full((2, 2), value), "n": torch.tensor(3)} for value in (1.0, 4.0)]
    mean = averaged(states, [1, 3])
    assert torch.equal(mean["w"], torch.full((2, 2), 3.25))
    assert mean["n"] == 3


def test_averages_are_flowers():
    flwr = pytest.importorskip("flwr.serverapp.strategy.strategy_utils", reason="the peer, pip install flwr")
    from flwr.app import ArrayRecord, MetricRecord, RecordDict

    random = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(5, 7, generator=random)} for _ in range(3)]
    examples = [10, 25, 3]
    records = [
        RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": n})})
        for state, n in zip(states, examples, strict=True)
    ]
    theirs = flwr.aggregate_arrayrecords(records, "num-examples").to_torch_state_dict()
    torch.testing.assert_close(averaged(states, examples)["w"], theirs["w"], rtol=1e-6, atol=1e-6)


def trained(out, name):
    return load_file(out / f"baselines/{name}.safetensors")


def distance(a, b):
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a)) ** 0.5


def test_a_proximal_term_keeps_the_average_near_its_start(finished, tiny_settings, tmp_path):
    config = settings(tiny_settings, "fedavg", fedavg={"proximal": 1000.0}, keep_checkpoints="all")
    experiment.run(config, tmp_path / "prox")
    free = distance(*(trained(finished["out"], f"fedavg/{n}") for n in ("001", "002")))
    held = distance(*(trained(tmp_path / "prox", f"fedavg/{n}") for n in ("001", "002")))
    assert held < 0.3 * free


def test_feddf_starts_from_the_average(tiny_settings, tmp_path):
    still = {"learning_rate": 1e-12, "head_learning_rate": 1e-12}
    student = {**tiny_settings["student"], "training": still}
    experiment.run(
        settings(tiny_settings, "feddf", rounds=1, student=student, keep_checkpoints="all"), tmp_path / "run"
    )
    average = load_file(tmp_path / "run/baselines/feddf/001.safetensors")
    assert distance(average, trained(tmp_path / "run", "feddf/001/distilled")) < 1e-4


def test_fedlora_trains_and_sends_adapters_and_head_alone(finished):
    first, second = (trained(finished["out"], f"fedlora/{n}") for n in ("001", "002"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert all("lora_" in name or name.startswith("head.") for name in changed)
    sent = finished["result"]["bytes"]["baselines"]
    assert sent["fedlora"]["uplink"] < 0.5 * sent["fedavg"]["uplink"]
    assert sent["fedlora"]["uplink"] == finished["result"]["bytes"]["lora_uplink_same_rounds"]


def test_fedfed_shares_the_tokens_that_matter(tiny_settings, tmp_path):
    config = settings(tiny_settings, fedfed={"share": 0.5, "noise": 0.0})
    splits = experiment.check(config)
    run = RunDirectory.create(tmp_path / "run", "")
    learner = learner_of(Session(config, splits, run, NoProgress()), config.student.model, "student.model")
    private = splits.private[0]
    tokens = learner.tokens(private)
    scores = sensitivity(learner, tokens, labels_of(private))
    assert [len(row) for row in scores] == list(map(len, tokens))
    assert all((row >= 0).all() for row in scores)
    # Whoever takes the most sensitive token away changes the loss more than who takes the least.
    most, least = (
        [t[:i] + t[i + 1 :] for t, i in zip(tokens, places, strict=True)]
        for places in ([int(row.argmax()) for row in scores], [int(row.argmin()) for row in scores])
    )
    whole, without_most, without_least = (
        inference.answer(learner.model, t, 10, pad_id=0, batch_size=64, bf16=False, meter=learner.meter)
        for t in (tokens, most, least)
    )
    assert (whole - without_most).abs().mean() > (whole - without_least).abs().mean()
    shared, labels, cost = share(learner.session, learner, private)
    assert cost.flops > 0
    assert torch.equal(labels, labels_of(private))
    for text, part in zip(tokens, shared, strict=True):
        assert len(part) == max(1, round(0.5 * len(text)))
        left = iter(text)
        assert all(token in left for token in part), "in their order"
    run.close()


def test_fedmkt_takes_the_client_that_knows_the_label_best(finished):
    inner, teacher = finished["out"] / "baselines/fedmkt", "rounds/001/teacher.safetensors"
    assert (inner / "ledger.json").is_file()
    theirs, ours = (load_file(out / teacher)["log_probs"] for out in (inner, finished["out"]))
    assert theirs.shape == (120, 10)
    assert not torch.equal(theirs, ours)


def test_fedmds_loss_is_the_mean_absolute_difference_of_centred_scores():
    random = np.random.default_rng(0)
    student, teacher = (torch.from_numpy(random.normal(size=(4, 5))).float() for _ in range(2))
    nothing = torch.full((4,), NO_LABEL)
    loss = example_loss(student + 3, nothing, teacher - 7, None, DistillConfig(kind="mae"))
    a, b = (x.numpy().astype(np.float64) for x in (student, teacher))
    expected = np.abs(a - a.mean(1, keepdims=True) - b + b.mean(1, keepdims=True)).mean(1).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_fedfed_works_where_frozen_layers_are_remembered(tiny_settings, tmp_path):
    """It wants gradients of embeddings, which nothing that is looked up has."""
    frozen = {"freeze_embeddings": True, "freeze_layers": 1, "frozen_cache_mb": 16}
    tiny_settings["student"]["model"] = {**tiny_settings["student"]["model"], "layers": None, **frozen}
    config = parse(tiny_settings | {"baselines": ["fedfed"], "rounds": 1})
    assert experiment.run(config, tmp_path / "run")["metrics"]["fedfed"]["accuracy"] > 0
