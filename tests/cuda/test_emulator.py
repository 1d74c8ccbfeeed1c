"""What the emulator must not let pass, or the other tests of this folder would prove nothing."""

import ctypes
import re

import pytest

THREADS = 2 * 64
KERNELS = (
    "some_wait",
    "wait_apart",
    "one_leaves",
    "leave_early",
    "write_past_end",
    "miss_a_barrier",
    "miss_a_cluster_barrier",
    "right",
)


@pytest.fixture
def run(emulated):
    def call(name):
        message = ctypes.create_string_buffer(500)
        found = emulated("emulator").run(KERNELS.index(name), message, ctypes.c_size_t(len(message)))
        return found, message.value.decode()

    return call


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some_wait", "deadlock: .* waits at a barrier with 80 of 128 threads not at their end"),
        ("wait_apart", "deadlock: .* waits at a (warp's )?barrier"),
        ("one_leaves", "deadlock: .* waits at a barrier of the cluster with 64 of 128"),
        ("leave_early", "the shared memory of a block that is at its end"),
        ("write_past_end", "block [01] wrote outside its shared memory"),
    ],
)
def test_a_wrong_kernel_is_an_error(name, message, run):
    told = next(told for found, told in (run(name) for _ in range(20)) if found == -1)
    assert re.match(message, told), told


@pytest.mark.parametrize("name", ["miss_a_barrier", "miss_a_cluster_barrier"])
def test_a_missing_barrier_shows(name, run):
    assert any(run(name)[0] < THREADS for _ in range(20))


def test_a_right_kernel_is_right(run):
    assert {run("right")[0] for _ in range(20)} == {THREADS}
