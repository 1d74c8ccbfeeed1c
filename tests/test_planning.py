"""What a run costs, foretold, is what it costs."""

import pytest
from plan_fixtures import assert_foretold

from feddistill.config import parse
from feddistill.runs import experiment, plan


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"payload": {"codec": "topk", "k": 3}, "keep_checkpoints": "all"},
        {"payload": {"codec": "threshold", "k": 3}, "baselines": [], "rounds": 1},
        {"payload": {"codec": "sampled", "samples": 9}, "baselines": [], "rounds": 1},
        {"frozen_cache_mb": 4, "baselines": []},
    ],
    ids=str,
)
def test_bytes_operations_and_disk_are_foretold(change, tiny_settings, tmp_path):
    """The other baselines are in ``test_methods.py``, which runs them all."""
    if "frozen_cache_mb" in change:
        frozen = {"freeze_embeddings": True, "freeze_layers": 1, "frozen_cache_mb": change["frozen_cache_mb"]}
        (model,) = tiny_settings["clients"]["models"]
        change = {"baselines": [], "clients": {**tiny_settings["clients"], "models": [{**model, **frozen}]}}
    config = parse(tiny_settings | change)
    found = assert_foretold(config, experiment.run(config, tmp_path / "run"))
    weights = [path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors")]
    assert found["disk_bytes"]["total"] >= 0.9 * sum(weights)


def test_clients_cost_the_rounds_in_which_they_are_asked(tiny_settings, tmp_path):
    clients = {**tiny_settings["clients"], "per_round": 2}
    baselines = ["local_only", "fedavg", "feddf"]
    config = parse(tiny_settings | {"clients": clients, "rounds": 3, "baselines": baselines})
    found, result = plan.plan(config), experiment.run(config, tmp_path / "run")
    uplink = [sum(of_round["uplink"].values()) for of_round in result["bytes"]["by_round"]]
    assert found["bytes"]["codecs"]["dense"]["all_rounds_and_clients"] == sum(uplink)
    assert any("client-1" not in row["uplink"] for row in result["bytes"]["by_round"])
    for phase in ("clients_train", "clients_answer", *(f"baseline_{name}" for name in baselines), "evaluate"):
        assert found["flops"][phase] == pytest.approx(result["flops"][phase], rel=0.05), phase
    for name in ("fedavg", "feddf"):
        assert result["bytes"]["baselines"][name]["uplink"] == result["bytes"]["fedavg_uplink_same_rounds"]


def test_what_zstd_will_take_off_is_not_foretold(tiny_settings, tmp_path):
    config = parse(tiny_settings | {"payload": {"compression": "zstd"}, "baselines": [], "rounds": 1})
    sent = plan.plan(config)["bytes"]
    assert sent["chosen"] == "dense, zstd: at most"
    uplink = experiment.run(config, tmp_path / "run")["bytes"]["by_round"][0]["uplink"]
    assert all(size <= sent["codecs"][sent["chosen"]]["upload"] + 600 for size in uplink.values())


def test_an_upload_breaks_even_where_it_is_as_large(tiny_settings):
    sent = plan.plan(parse(tiny_settings))["bytes"]
    a_row = sent["codecs"]["dense"]["a_row"]
    for other in ("fedavg", "federated_lora"):
        texts = sent["break_even_rows"][other]
        assert texts * a_row == pytest.approx(sent[other]["upload"], rel=0.01)


def test_nothing_is_written(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plan.plan(parse(tiny_settings))
    assert sorted(tmp_path.rglob("*")) == before
