"""A test with a ``backend`` argument runs on every backend of its module's ``OPERATOR``."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from feddistill_kernels import available_backends


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OPERATOR"):
        metafunc.parametrize("backend", available_backends(metafunc.module.OPERATOR, "cpu"))


def pytest_collection_modifyitems(items):
    reason = pytest.mark.skip("Triton's interpreter truncates where it should round to bfloat16")
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if params and params.get("backend") == "triton" and torch.bfloat16 in params.values():
            item.add_marker(reason)


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Where others use the cores, threads that wait for each other wait for them too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_filled_memory():
    """``torch.empty`` gives NaN, so that what is read before it is written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True, scope="session")
def a_sort_that_ends():
    """Triton's interpreter takes the xor of each pair of a sort in Python, number by number."""
    if find_spec("triton") is None:
        yield
        return
    from triton.language import standard
    from triton.runtime.interpreter import ReduceOps

    slow = ReduceOps.generic_reduce

    def reduce(self, tensors):
        if self.combine_fn is not standard._xor_combine or len(tensors) > 1:
            return slow(self, tensors)
        (x,) = tensors
        return [
            self.to_tensor(
                np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims), x.dtype
            )
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReduceOps, "generic_reduce", reduce)
        yield
