"""A test with a ``backend`` argument runs on every backend of its module's ``OPERATOR``.

``pytest tests/kernels --device cuda`` runs them on a GPU: tensors are made there unless a test says where.
Elsewhere Triton's kernels are interpreted, a thousand times slower: a test says with ``interpreted(where)``
which of its cases are, one for each kernel and dtype, and the other backends run all.
"""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from feddistill_kernels import BackendError, available_backends

PACK = 16
"""Neighbours that stay in one share: they tend to compile the same kernels."""


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu(reason): not on a GPU")
    config.addinivalue_line("markers", "gpu: on a GPU only")
    config.addinivalue_line("markers", "interpreted(where): where Triton runs without a GPU")
    if config.getoption("--device") == "cpu":
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for nan_filled_memory
    torch.set_default_device("cuda")  # before test modules are imported: they make tensors


def pytest_unconfigure(config):
    if config.getoption("--device") != "cpu":
        torch.set_default_device(None)


def pytest_generate_tests(metafunc):
    operator = getattr(metafunc.module, "OPERATOR", None)
    if operator and "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available_backends(operator, metafunc.config.getoption("--device")))


def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--device") != "cpu"
    # The reference has operations that are deterministic on a CPU alone.
    unsure = pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")
    inductor = pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor")
    if not on_gpu:
        config.hook.pytest_deselected(items=[item for item in items if is_for_a_gpu(item)])
        items[:] = [item for item in items if not is_for_a_gpu(item)]
    for item in items:
        if on_gpu:
            item.add_marker(unsure)
            item.add_marker(inductor)
            if mark := item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(f"for a CPU: {mark.args[0]}"))
    if share := config.getoption("--share"):
        mine, shares = map(int, share.split("/"))
        items[:] = [item for index, item in enumerate(items) if index // PACK % shares == mine]


def is_for_a_gpu(item):
    """What needs one, and what Triton's interpreter need not run or does wrong: it truncates to bfloat16."""
    if item.get_closest_marker("gpu"):
        return True
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if params.get("backend") != "triton":
        return False
    wanted = all(mark.kwargs["where"](**params) for mark in item.iter_markers("interpreted"))
    return torch.bfloat16 in params.values() or not wanted


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip what a backend refuses: a size on a GPU, a kind of divergence that only the reference has."""
    try:
        return (yield)
    except BackendError as refusal:
        if pyfuncitem.config.getoption("--device") == "cpu" and "it has no kind" not in str(refusal):
            raise
        return pytest.skip(str(refusal))


@pytest.fixture(scope="session")
def device(request):
    """Of the tensors: ``cpu`` or ``cuda``."""
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Where others use the cores, threads that wait for each other wait for them too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_filled_memory(device):
    """``torch.empty`` gives NaN, so that what is read before it is written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True, scope="session")
def a_faster_interpreter():
    """Triton's takes the xor of a sort number by number, and patches the language at each call."""
    if find_spec("triton") is None:
        yield
        return
    from triton.language import standard
    from triton.runtime import interpreter

    slow_reduce, slow_patch, patched = interpreter.ReduceOps.generic_reduce, interpreter._patch_lang, set()

    def reduce(self, tensors):
        if self.combine_fn is not standard._xor_combine or len(tensors) > 1:
            return slow_reduce(self, tensors)
        (x,) = tensors
        return [
            self.to_tensor(
                np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims), x.dtype
            )
        ]

    class Scope(interpreter._LangPatchScope):
        def restore(self):
            super().restore()
            patched.clear()

    def patch(function):
        """For a launch, and in it once for the functions of a module; a launch alone restores."""
        if (module := function.__globals__["__name__"]) in patched:
            return Scope()
        patched.add(module)
        scope = Scope()
        scope._changes = slow_patch(function)._changes
        return scope

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce)
        monkeypatch.setattr(interpreter, "_patch_lang", patch)
        yield
