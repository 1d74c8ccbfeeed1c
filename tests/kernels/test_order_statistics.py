"""Median, trimmed mean and the mean around the median."""

import math

import pytest
import torch
from kernels import oracles
from kernels.pairs import pairwise

from feddistill_kernels import (
    BackendError,
    available_backends,
    coordinate_median,
    mean_around_median,
    trimmed_mean,
)
from feddistill_kernels._native import DTYPES as DTYPE_CODES
from feddistill_kernels._native import library

OPERATOR = "order_statistics"
INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


MOST_TRITON_CLIENTS = 32

pytestmark = pytest.mark.interpreted(where=lambda count=0, **_: count <= MOST_TRITON_CLIENTS)


@pytest.fixture(autouse=True)
def what_triton_takes(request):
    """On a GPU, where it is not interpreted."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("backend") == "triton" and params.get("count", 0) > MOST_TRITON_CLIENTS:
        pytest.skip(f"Triton's kernels take up to {MOST_TRITON_CLIENTS} clients")


def clients(count, shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def assert_rounded(got, truth, xs):
    """Float32 sums, rounded once to the clients' dtype."""
    size = float(torch.stack(xs).double().abs().amax()) if truth.numel() else 0.0
    owed = torch.finfo(got.dtype).eps / 2 * truth.abs() + 8 * torch.finfo(torch.float32).eps * size
    assert ((got.double() - truth).abs() <= owed).all()


COUNTS = [*range(1, 34), 50, 101]
"""Every C that has a network of its own, and some that share the one for any C."""


@pytest.mark.interpreted(where=lambda count, dtype, **_: dtype is torch.float32 or count % 4 == 1)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_trim_of_every_number_of_clients_agrees_with_the_oracle(
    count, dtype, backend, nan_filled_memory
):
    xs = clients(count, (3, 89), dtype)
    stacked = torch.stack(xs)
    for trim in {0, 1, (count - 1) // 3, (count - 1) // 2}:
        if 2 * trim < count:
            got = trimmed_mean(xs, trim, backend=backend)
            assert (got.shape, got.dtype) == ((3, 89), dtype)
            assert_rounded(got, oracles.trimmed_mean(stacked, trim), xs)
    assert_rounded(
        coordinate_median(xs, backend=backend), oracles.trimmed_mean(stacked, (count - 1) // 2), xs
    )


@pytest.mark.parametrize(
    ("n", "count", "dtype"),
    pairwise([0, 1, 3, 4, 15, 17, 31, 33, 255, 257, 4099], [2, 5, 40], DTYPES),
    ids=str,
)
def test_sizes_around_the_blocks(dtype, n, count, backend, nan_filled_memory):
    xs = clients(count, n, dtype)
    got = coordinate_median(xs, backend=backend)
    assert_rounded(got, oracles.trimmed_mean(torch.stack(xs), (count - 1) // 2), xs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 8, 40])
def test_nan_of_any_client_is_nan_at_its_coordinate_only(count, dtype, backend):
    for liar in range(count):
        xs = clients(count, 70, dtype)
        xs[liar][11] = math.nan
        xs[liar][64] = -math.nan
        for got in (trimmed_mean(xs, 0, backend=backend), coordinate_median(xs, backend=backend)):
            assert got.isnan().nonzero()[:, 0].tolist() == [11, 64]


@pytest.mark.parametrize("count", [5, 40])
def test_infinities_are_outvoted(count, backend):
    xs = clients(count, 33)
    xs[0].fill_(INF)
    xs[1].fill_(-INF)
    assert coordinate_median(xs, backend=backend).isfinite().all()
    assert trimmed_mean(xs, 1, backend=backend).isfinite().all()
    torch.testing.assert_close(
        trimmed_mean(xs, 1, backend=backend), trimmed_mean(xs[2:], 0, backend=backend), rtol=1e-5, atol=1e-6
    )


def test_an_even_majority_of_ruled_out_is_ruled_out(backend):
    xs = [torch.tensor([x]) for x in (-INF, -INF, 0.0, 1.0)]
    assert coordinate_median(xs, backend=backend) == -INF


def test_ties_are_values_not_clients(backend):
    xs = [torch.tensor([x]) for x in (2.0, 2.0, 2.0, 1.0, 7.0)]
    assert coordinate_median(xs, backend=backend) == 2
    assert trimmed_mean(xs, 1, backend=backend) == 2


@pytest.mark.parametrize("count", [4, 7, 40])
def test_order_of_clients_is_irrelevant(count, backend):
    xs = clients(count, 301)
    for trim in (0, 1, (count - 1) // 2):
        forth, back = (trimmed_mean(order, trim, backend=backend) for order in (xs, xs[::-1]))
        assert torch.equal(forth, back)


@pytest.mark.parametrize("count", [3, 6])
def test_the_median_lies_among_the_honest(count, backend):
    """``f`` liars, 2f < C, cannot move it out of the range of the others."""
    liars = (count - 1) // 2
    honest = clients(count - liars, 200)
    got = coordinate_median(honest + [torch.full((200,), 1e30)] * liars, backend=backend)
    stacked = torch.stack(honest)
    assert ((got >= stacked.amin(0)) & (got <= stacked.amax(0))).all()


@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "expanded"])
def test_strides_do_not_matter(layout, backend):
    xs = []
    for _ in range(5):
        whole = torch.randn(8, 8)
        xs.append(
            {
                "rows": whole[::2],
                "columns": whole[:, ::2].T,
                "transposed": whole.T[:4],
                "expanded": whole[:1].expand(4, 8),
            }[layout]
        )
    got = coordinate_median(xs, backend=backend)
    assert got.is_contiguous()
    assert torch.equal(got, coordinate_median([x.contiguous() for x in xs], backend=backend))


@pytest.mark.parametrize("pattern", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_survives(pattern, backend):
    """The median of one client is that client, subnormals and infinities included."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(pattern)
    got = coordinate_median([numbers], backend=backend)
    finite = ~numbers.isnan()
    assert torch.equal(got.isnan(), ~finite)
    assert torch.equal(got[finite], numbers[finite])


@pytest.mark.cpu("threads are a CPU's")
@pytest.mark.interpreted(where=lambda **_: False)
@pytest.mark.parametrize(("count", "dtype"), [(5, DTYPES[0]), (5, DTYPES[2]), (40, DTYPES[1])], ids=str)
def test_the_number_of_threads_changes_nothing(count, dtype, backend):
    xs = clients(count, 50_003, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([trimmed_mean(xs, 1, backend=backend), coordinate_median(xs, backend=backend)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cpu("instruction sets are a CPU's")
@pytest.mark.parametrize("count", [1, 2, 7, 32, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(count, dtype):
    """This machine runs the best it has; others run the rest."""
    module = library()
    xs = clients(count, 1003, dtype)
    xs[0][5] = math.nan
    results = []
    for index, _ in enumerate(module.instruction_sets()):
        got = torch.empty_like(xs[0])
        pointers = [x.data_ptr() for x in xs]
        module.trimmed_mean_cpu(
            pointers, 1003, DTYPE_CODES[dtype], (count - 1) // 3, got.data_ptr(), 1, index
        )
        results.append(got.view(torch.int32 if dtype == torch.float32 else torch.int16))
    assert all(torch.equal(other, results[0]) for other in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 8, 17, 32, 33, 40])
def test_mean_around_median_agrees_with_the_oracle(count, dtype, backend, nan_filled_memory):
    xs = clients(count, (2, 61), dtype)
    for keep in {*range(1, count + 1)} if count < 10 else {1, 2, count // 2, count - 1, count}:
        truth = oracles.mean_around_median(torch.stack(xs), keep)
        got = mean_around_median(xs, keep, backend=backend)
        assert got.dtype == dtype
        assert_rounded(got, truth, xs)


@pytest.mark.parametrize(
    ("dtype", "count", "n"),
    pairwise([torch.bfloat16, torch.float32], [5, 40], [0, 1, 15, 33, 255, 257, 4099]),
    ids=str,
)
def test_mean_around_median_of_sizes_around_the_blocks(dtype, count, n, backend, nan_filled_memory):
    xs = clients(count, n, dtype)
    truth = oracles.mean_around_median(torch.stack(xs), 3)
    assert_rounded(mean_around_median(xs, 3, backend=backend), truth, xs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_around_median_outvotes_infinities_and_shows_nan(dtype, backend):
    rows = ((1.0, 1.0), (2.0, 2.0), (4.0, 4.0), (INF, 5.0), (-INF, math.nan))
    got = mean_around_median([torch.tensor(row, dtype=dtype) for row in rows], 3, backend=backend)
    assert float(got[0]) == pytest.approx(7 / 3, rel=torch.finfo(dtype).eps)
    assert got[1].isnan()


@pytest.mark.parametrize("count", [4, 7, 40])
def test_around_the_median_the_order_of_clients_is_irrelevant(count, backend):
    xs = clients(count, 301)
    forth, back = (mean_around_median(order, 3, backend=backend) for order in (xs, xs[::-1]))
    assert torch.equal(forth, back)


@pytest.mark.skipif(
    "triton" not in available_backends(OPERATOR, torch.get_default_device()), reason="needs triton"
)
@pytest.mark.parametrize("rule", [coordinate_median, lambda xs, **k: mean_around_median(xs, 3, **k)])
def test_triton_refuses_more_clients_than_registers_hold(rule):
    with pytest.raises(BackendError, match=r"'triton' cannot run this .*: it takes up to 32 clients, got 33"):
        rule([torch.zeros(3)] * 33, backend="triton")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coordinate_median([]), "xs must hold at least one tensor"),
        (
            lambda: coordinate_median([torch.zeros(3), torch.zeros(4)]),
            r"xs\[1\] is float32 \[4\] on .* but",
        ),
        (lambda: coordinate_median([torch.zeros(3), torch.zeros(3).half()]), r"xs\[1\] is float16 \[3\]"),
        (lambda: coordinate_median([torch.zeros(3, dtype=torch.int32)]), r"xs\[0\] must be floating point"),
        (lambda: trimmed_mean([torch.zeros(3)] * 4, 2), r"trim must be in \[0, 1\] for 4 clients, got 2"),
        (lambda: trimmed_mean([torch.zeros(3)] * 4, -1), r"trim must be in \[0, 1\] for 4 clients, got -1"),
        (lambda: mean_around_median([torch.zeros(3)] * 4, 5), r"keep must be in \[1, 4\]"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backward_pass_is_refused():
    xs = [torch.randn(3, requires_grad=True) for _ in range(3)]
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        coordinate_median(xs).sum().backward()


def test_a_dtype_without_kernels_is_refused():
    with pytest.raises(
        ValueError, match=r"xs\[0\] must be floating point \(float32, .*got torch.float8_e4m3fn"
    ):
        coordinate_median([torch.zeros(3).to(torch.float8_e4m3fn)])
