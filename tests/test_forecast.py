"""What is going on, and when it will be done: said after ten seconds, from the operations that are left."""

import re
import shutil
from contextlib import contextmanager

import pytest

from feddistill.config import parse
from feddistill.progress import NoProgress
from feddistill.runs import experiment, forecast
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.session import Session


class Lines:
    """Progress that keeps its lines."""

    def __init__(self):
        self.lines = []

    @contextmanager
    def step(self, label):
        yield lambda done, total: None

    def log(self, line):
        self.lines.append(line)

    def table(self, table):
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by a second at each look."""
    now = iter(range(10**6))
    monkeypatch.setattr(forecast.time, "monotonic", lambda: float(next(now)))


def test_a_line_after_ten_seconds_says_what_is_left(clock):
    progress = Lines()
    told = forecast.Forecast(progress, 0.0)
    told.remaining, told._since = 1000, 0.0
    told.session = Session(None, None, None, progress)
    with told.step("client-0 learns") as on_step:
        for done in range(400):
            told.session.work.flops = 10 * done // 5
            on_step(done, 400)
    assert len(progress.lines) == 2
    assert progress.lines == [
        "client-0 learns, 10 of 400; done in about 8 min 10 s",
        "client-0 learns, 310 of 400; done in about 3 min 10 s",
    ]


def test_the_operations_left_are_those_that_are_then_counted(tiny_settings, tmp_path, monkeypatch):
    frozen = {"freeze_embeddings": True, "freeze_layers": 1, "frozen_cache_mb": 4}
    (model,) = tiny_settings["clients"]["models"]
    clients = {**tiny_settings["clients"], "models": [model | frozen]}
    config = parse({**tiny_settings, "clients": clients, "keep_checkpoints": "all"})
    seen = []

    def expect(self, session, plain=forecast.Forecast.expect):
        plain(self, session)
        seen.append((self.remaining, session.work))

    monkeypatch.setattr(forecast.Forecast, "expect", expect)
    monkeypatch.setattr(forecast, "FIRST", 0.0)
    progress = Lines()
    out = tmp_path / "run"
    result = experiment.run(config, out, progress=progress)
    ((remaining, work),) = seen
    assert 0.5 < work.flops / sum(result["flops"].values()) < 0.98  # frozen layers once, not in each step
    assert remaining == pytest.approx(work.flops, rel=0.05)
    assert re.search(r"client-0 alone: segment 1, 1 of \d+; done in about ", "\n".join(progress.lines))

    for name in ("result.json", "records/rounds/002.json", "records/rounds/002/student.json"):
        (out / name).unlink()
    shutil.rmtree(out / "records/methods")
    shutil.rmtree(out / "records/baselines")
    again = experiment.run(config, out, resume=True, progress=progress)
    assert again["flops"] == result["flops"]
    remaining, work = seen[1]
    assert 0 < work.flops < seen[0][1].flops / 2
    assert work.flops / 2 < remaining < 2 * work.flops


def test_a_quiet_run_foretells_nothing(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast.Forecast, "expect", lambda *_: pytest.fail("was asked"))
    assert experiment.run(tiny_config, tmp_path / "run", progress=NoProgress())["status"] == "complete"
    run = RunDirectory.open(tmp_path / "run")
    assert forecast.done(run) > 0
    run.close()
