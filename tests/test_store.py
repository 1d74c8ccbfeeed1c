"""The run directory: whole or not there, whatever happens."""

import errno

import pytest

from feddistill.errors import RunError
from feddistill.store.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", "name: tiny\n")
    yield directory
    directory.close()


def test_a_step_is_done_when_its_record_is_there(run):
    assert run.done("a/b") is None
    run.write_bytes("a/b.bin", b"weights")
    run.commit("a/b", {"loss": 1.5}, ["a/b.bin"])
    assert run.done("a/b") == {"loss": 1.5}


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_a_damaged_file_is_not_trusted(run, damage):
    path = run.write_bytes("w.bin", b"weights")
    run.commit("step", {}, ["w.bin"])
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"weight" if damage == "shorter" else b"WEIGHTS")
    with pytest.raises(RunError, match=r"w\.bin is missing or damaged: it is not what step wrote"):
        run.done("step")
    assert run.done("step", verify=False) == {}


def test_a_write_that_fails_leaves_nothing(run):
    run.write_bytes("w.bin", b"old")

    def full(path):
        path.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match=r"cannot write .*w\.bin: No space left on device"):
        run.write("w.bin", full)
    assert run.read_bytes("w.bin") == b"old"
    assert not list(run.root.rglob("*.partial"))


def test_left_overs_of_a_killed_run_are_cleared(run):
    (run.root / "rounds").mkdir()
    for folder in (run.root, run.root / "rounds"):
        (folder / "w.bin.partial").write_bytes(b"half")
    run.close()
    RunDirectory.open(run.root).close()
    assert not list(run.root.rglob("*.partial"))


def test_a_damaged_record_is_named(run):
    run.commit("step", {})
    (run.root / "records/step.json").write_text("{")
    with pytest.raises(RunError, match=r"records/step\.json is damaged"):
        run.done("step")


def test_two_processes_do_not_share_a_run(run):
    with pytest.raises(RunError, match="in use by another process"):
        RunDirectory.open(run.root)


def test_what_is_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RunError, match="already exists; go on with --resume, or choose another --out"):
        RunDirectory.create(tmp_path, "")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="already exists"):
        RunDirectory.create(tmp_path / "file", "")
    with pytest.raises(RunError, match="cannot create"):
        RunDirectory.create(tmp_path / "file" / "run", "")


def test_a_run_killed_before_it_had_a_configuration_can_start_again(run):
    (run.root / "config.yaml").unlink()
    run.close()
    RunDirectory.create(run.root, "name: tiny\n").close()
    assert (run.root / "config.yaml").is_file()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is not a run: it has no config\.yaml"):
        RunDirectory.open(tmp_path)
