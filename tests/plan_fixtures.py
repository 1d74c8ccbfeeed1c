"""What an estimate is compared with: the run itself."""

import pytest

from feddistill.runs import plan


def assert_foretold(config, result):
    """The bytes and operations of ``result`` are those of the estimate for ``config``, which is returned."""
    found = plan.plan(config)
    sent = found["bytes"]
    uplink = [sum(of_round["uplink"].values()) for of_round in result["bytes"]["by_round"]]
    assert sent["codecs"][sent["chosen"]]["all_rounds_and_clients"] == sum(uplink)
    assert sent["proxy_download"] * found["clients"] == result["bytes"]["proxy"]
    assert (
        sent["fedavg"]["upload"] * found["clients"] * found["rounds"]
        == result["bytes"]["fedavg_uplink_same_rounds"]
    )
    for phase, operations in result["flops"].items():
        if operations:
            assert found["flops"][phase] == pytest.approx(operations, rel=0.05), phase
    return found
