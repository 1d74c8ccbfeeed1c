"""The CUDA kernels of the distance rules, thread by thread, against the reference."""

import ctypes
import math

import pytest
import torch

from feddistill_kernels._native import DTYPES
from feddistill_kernels.distances import _reference

INF, NAN = math.inf, math.nan
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Clients(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.POINTER(ctypes.c_void_p)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("count", ctypes.c_int),
        ("n", ctypes.c_int64),
        ("v", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    )


class Kernels:
    """The rules as in ``_reference``."""

    def __init__(self, library):
        self.library = library
        library.workspace.restype = ctypes.c_int64

    def geometric_median(self, xs, per_row, tolerance=1e-6, max_iterations=64):
        out = torch.full(xs[0].shape, NAN, dtype=xs[0].dtype)
        settings = int(per_row), ctypes.c_double(tolerance), max_iterations
        self.run("geometric_median", xs, *settings, ctypes.c_void_p(out.data_ptr()), per_row=per_row)
        return out

    def krum(self, xs, byzantine, keep):
        out = torch.full(xs[0].shape, NAN, dtype=xs[0].dtype)
        self.run("krum", xs, byzantine, keep, ctypes.c_void_p(out.data_ptr()))
        return out

    def nearest_neighbour_mixing(self, xs, byzantine):
        outs = [torch.full(x.shape, NAN, dtype=x.dtype) for x in xs]
        self.run("nearest_neighbour_mixing", xs, byzantine, self.pointers(outs))
        return outs

    def run(self, rule, xs, *settings, per_row=False):
        n, v = xs[0].shape
        strides = (ctypes.c_int64 * len(xs))(*[x.stride(0) for x in xs])
        clients = Clients(self.pointers(xs), strides, len(xs), n, v, DTYPES[xs[0].dtype])
        size = self.library.workspace(ctypes.byref(clients), int(per_row))
        workspace = torch.full((size,), 255, dtype=torch.uint8)  # NaN
        getattr(self.library, rule)(ctypes.byref(clients), *settings, ctypes.c_void_p(workspace.data_ptr()))

    @staticmethod
    def pointers(xs):
        return (ctypes.c_void_p * len(xs))(*[x.data_ptr() for x in xs])


@pytest.fixture(scope="module")
def kernels(emulated):
    return Kernels(emulated("distances"))


def clients(count, shape, dtype=torch.float32):
    """Answers that agree but for noise, each row on a level of its own as logits are."""
    common = torch.randn(shape)
    return [(common + torch.randn(shape) + torch.randn(shape[0], 1)).to(dtype) for _ in range(count)]


def assert_alike(got, expected):
    torch.testing.assert_close(got, expected, rtol=torch.finfo(got.dtype).eps, atol=2e-5, equal_nan=True)


def assert_all_alike(kernels, xs, byzantine):
    for per_row in (True, False):
        expected = _reference.geometric_median(xs, per_row, 1e-6, 64)
        assert_alike(kernels.geometric_median(xs, per_row), expected)
    if len(xs) >= 2 * byzantine + 3:
        for keep in {1, len(xs) - byzantine}:
            assert_alike(kernels.krum(xs, byzantine, keep), _reference.krum(xs, byzantine, keep))
    if len(xs) > 2 * byzantine:
        expected = _reference.nearest_neighbour_mixing(xs, byzantine)
        for mixed, other in zip(kernels.nearest_neighbour_mixing(xs, byzantine), expected, strict=True):
            assert_alike(mixed, other)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 8, 16])
def test_every_rule_is_the_references(count, dtype, kernels):
    for shape in ((3, 89), (1, 1), (1, 4099)):
        if count < 16 or dtype is torch.float32 or shape == (3, 89):
            assert_all_alike(kernels, clients(count, shape, dtype), (count - 1) // 3)


def test_rows_are_taken_several_to_a_piece(kernels):
    xs = clients(3, (513, 3))
    assert_alike(kernels.krum(xs, 0, 2), _reference.krum(xs, 0, 2))


def test_rows_with_a_stride(kernels):
    xs = [torch.randn(6, 100)[::2, i : i + 80] for i in range(5)]
    assert_all_alike(kernels, xs, 1)


@pytest.mark.parametrize("size", [1e6, 1e15, 1e25, INF, NAN])
@pytest.mark.parametrize("where", [(0, 1), (3, 6)], ids=str)
def test_outliers_do_not_move_it(where, size, kernels):
    honest = clients(5, (2, 90))
    xs = list(honest)
    for index in where:
        xs.insert(index, torch.randn(2, 90) * size)
    for per_row in (True, False):
        got = kernels.geometric_median(xs, per_row)
        assert_alike(got, _reference.geometric_median(xs, per_row, 1e-6, 64))
        assert got.isfinite().all()
    assert_alike(kernels.krum(xs, 2, 3), _reference.krum(xs, 2, 3))


# From 2^13 to 2^14 floats are 2^-10 apart: the clients differ by a few of those steps.
def test_nearly_equal_clients_far_from_the_origin_keep_their_digits(kernels):
    base = 2**13 * (1 + 0.9 * torch.rand(2, 500))
    xs = [base + 2**-10 * torch.randint(-3, 4, (2, 500)) for _ in range(7)]
    exact = [(x.double() - base.double()) * 1024 for x in xs]  # integers, for the reference
    for per_row in (True, False):
        expected = _reference.geometric_median(exact, per_row, 1e-6, 64) / 1024
        got = kernels.geometric_median(xs, per_row).double() - base.double()
        assert (got - expected).abs().amax() <= 2**-10 * 0.51  # half a step: the rounding of the result


def test_a_client_where_most_are_or_amid_the_others_is_the_median(kernels):
    place, x, y = torch.randn(3, 2, 40)
    most = [torch.randn(2, 40), place, torch.randn(2, 40) * 100, place.clone(), place.clone()]
    assert torch.equal(kernels.geometric_median(most, True), place)
    amid = [place, place + x, place - x, place + 3 * y, place - 3 * y]
    torch.testing.assert_close(kernels.geometric_median(amid, True), place, rtol=1e-6, atol=1e-6)


def test_lost_clients_have_no_say_in_their_rows_only(kernels):
    xs = clients(5, (3, 70))
    xs[0][1, 65] = NAN
    assert_alike(kernels.geometric_median(xs, True), _reference.geometric_median(xs, True, 1e-6, 64))
    for x in xs:
        x[1, 5] = -INF
    assert kernels.geometric_median(xs, True).isnan().all(-1).tolist() == [False, True, False]
    assert kernels.geometric_median(xs, False).isnan().all()


def test_equal_clients_give_themselves(kernels):
    x = torch.randn(2, 77)
    xs = [x.clone() for _ in range(5)]
    for got in (kernels.geometric_median(xs, True), kernels.krum(xs, 1, 2)):
        assert torch.equal(got, x)
    assert all(torch.equal(mixed, x) for mixed in kernels.nearest_neighbour_mixing(xs, 1))
