"""Which backend runs, what a missing one says, and that importing does nothing."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch

import feddistill_kernels as fk
from feddistill_kernels import _backend, _dispatch, _native

pytestmark = pytest.mark.cpu("what it names are a CPU's backends")

MODULES = [
    module.name
    for module in pkgutil.walk_packages(fk.__path__, "feddistill_kernels.")
    if not module.name.rsplit(".", 1)[1].startswith(("_C", "_triton"))
]


def median(**settings):
    return fk.coordinate_median([torch.ones(2)], **settings)


@pytest.mark.parametrize("name", ["feddistill_kernels", *MODULES])
def test_docstrings_are_right(name):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


def test_everything_exported_exists_and_nothing_else_is_public():
    modules = {name.rsplit(".", 1)[1] for name in MODULES}
    public = {name for name in vars(fk) if not name.startswith("_")} - modules
    assert public == set(fk.__all__)


def test_every_operator_has_a_reference_and_its_file_tree_is_its_backends():
    for op in fk.operators():
        assert "reference" in fk.available_backends(op, "cpu")
        assert fk.available_backends(op, "meta") == ("reference",)


def test_on_a_gpu_the_reference_comes_before_unmeasured_native_code():
    assert fk.available_backends("order_statistics", "cuda")[0] == "reference"


def test_native_is_the_default_on_the_cpu_where_it_is_written():
    assert fk.available_backends("order_statistics", "cpu")[:2] == ("native", "reference")


def test_the_table_decides_by_device_dtype_and_shape_and_never_over_a_name(monkeypatch):
    few = _dispatch.Entry(
        "cpu",
        ("reference",),
        operators=("order_statistics",),
        dtypes=(torch.float32,),
        rows=(0, 2),
        columns=(9, 99),
    )
    monkeypatch.setattr(_dispatch, "TABLE", (few, *_dispatch.TABLE))
    _backend._entries.cache_clear()
    try:
        chosen = {
            (op, dtype, shape): _backend.load(
                op, "auto", torch.empty(shape, dtype=dtype), clients=1
            ).__name__.rsplit("._")[1]
            for op in ("order_statistics", "distances")
            for dtype in (torch.float32, torch.float16)
            for shape in ((2, 9), (2, 8), (3, 9), (2, 1, 99), (2, 100))
        }
        by_reference = {key for key, backend in chosen.items() if backend == "reference"}
        assert by_reference == {("order_statistics", torch.float32, shape) for shape in ((2, 9), (2, 1, 99))}
        assert fk.available_backends("order_statistics")[0] == "native"
        named = _backend.load("order_statistics", "native", torch.empty(2, 9), clients=1)
        assert named.__name__.endswith("._native")
    finally:
        _backend._entries.cache_clear()


def test_a_backend_with_limits_is_passed_by_or_says_so():
    many = [torch.zeros(2) for _ in range(33)]
    assert torch.equal(fk.coordinate_median(many), torch.zeros(2))
    module = importlib.import_module("feddistill_kernels.order_statistics._native")
    assert module.cannot("cpu", clients=33) is None
    assert module.cannot("cuda", clients=32) is None
    assert module.cannot("cuda", clients=33) == "on cuda it takes up to 32 clients, got 33"
    with pytest.raises(fk.BackendError, match="backend 'triton' cannot run this topk: it sorts at most 1024"):
        fk.topk_compress(torch.zeros(1, 2000), 1025, backend="triton")


def test_use_backend_is_what_runs_and_ends_with_its_block():
    with fk.use_backend("triton"):
        with pytest.raises(fk.BackendError, match="run this order_statistics: it takes up to 32 clients"):
            fk.coordinate_median([torch.ones(2)] * 33)
        assert torch.equal(median(backend="reference"), torch.ones(2))  # the argument goes first
    assert torch.equal(median(), torch.ones(2))


def test_use_backend_ends_when_its_block_fails():
    with pytest.raises(KeyError), fk.use_backend("triton"):
        raise KeyError
    assert torch.equal(median(), torch.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: median(backend="natve"), ValueError, "unknown backend 'natve'; .*did you mean 'native'"),
        (lambda: fk.use_backend("gpu").__enter__(), ValueError, "unknown backend 'gpu'"),
        (lambda: fk.available_backends("median"), ValueError, "unknown operator 'median'"),
        (
            lambda: _backend.load("topk", "triton", torch.empty(0, device="meta")),
            fk.BackendError,
            "backend 'triton' cannot run topk on meta: ",
        ),
        (
            lambda: fk.coordinate_median([torch.zeros(2).double()], backend="native"),
            fk.BackendError,
            "float64 is for the reference only",
        ),
    ],
)
def test_what_cannot_run_says_why(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture
def without_compiled_module(monkeypatch):
    """As on a machine where ``_C`` was not built."""
    caches = (_backend._missing, _native.compiled)
    monkeypatch.setitem(sys.modules, "feddistill_kernels._C", None)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_the_compiled_module_the_reference_runs_and_native_says_why(without_compiled_module):
    assert fk.available_backends("order_statistics", "cpu")[0] == "reference"
    assert torch.equal(median(), torch.ones(2))
    with pytest.raises(fk.BackendError, match="_C does not load"):
        median(backend="native")
    assert fk.build_info()["native"].startswith("no: ")


def test_build_info_names_the_compiler_openmp_and_cuda():
    info = fk.build_info()
    assert {"native", "compiler", "instruction set", "openmp", "cuda"} == set(info)
    assert info["cuda"].split(":")[0] in ("yes", "no")


@pytest.fixture(scope="module")
def loaded():
    """What a process that starts has loaded after the import, after calls, and after one of a projection."""
    code = """
import sys
import feddistill_kernels as fk
print([m for m in sys.modules if m.split('.')[0] == 'triton' or m == 'feddistill_kernels._C'])

import torch

rows = [torch.randn(4, 8) for _ in range(3)]
fk.coordinate_median(rows)
fk.geometric_median(rows)
fk.mean_around_median(rows, 2)
fk.aggregate_topk([fk.topk_compress(x, 2) for x in rows], "mean_probs")
x = rows[0].requires_grad_()
fk.distillation_loss(x, rows[1]).backward()
print("triton" in sys.modules)
head = fk.TeacherHead(rows[1], torch.randn(8, 8))
fk.linear_distillation_loss(x, torch.randn(8, 8), head).backward()  # here torch's own compiler loads it
print([name for name in sys.modules if name.startswith("feddistill_kernels.") and "_triton" in name])
print([op for op in fk.operators() if f"feddistill_kernels.{op}._native" not in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_importing_loads_no_triton_and_no_compiled_module(loaded):
    assert loaded[0] == "[]"


def test_calls_on_the_cpu_load_no_triton(loaded):
    """It is 70 MB that a coordinator without a GPU would hold for nothing."""
    assert loaded[1:] == ["False", "[]", "['vocabulary_parallel']"]
