"""Geometric median, Krum and the mixing of neighbours."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from kernels import oracles
from kernels.pairs import pairwise

from feddistill_kernels import available_backends, geometric_median, krum, nearest_neighbour_mixing
from feddistill_kernels._native import library
from feddistill_kernels.distances import _native

OPERATOR = "distances"
INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Name: the rule against so many bad clients, as one tensor.
RULES = {
    "geometric median of rows": lambda xs, bad, **k: geometric_median(xs, **k),
    "geometric median": lambda xs, bad, **k: geometric_median(xs, per_row=False, **k),
    "krum": krum,
    "multi-krum": lambda xs, bad, **k: krum(xs, bad, keep=len(xs) - bad, **k),
    "mixing": lambda xs, bad, **k: torch.stack(nearest_neighbour_mixing(xs, bad, **k)),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
# Its kernels are those of Krum.
pytestmark = pytest.mark.interpreted(where=lambda rule=None, **_: rule is not RULES["multi-krum"])


@pytest.fixture(autouse=True)
def warnings_of_nan():
    """Triton's interpreter has them from NumPy."""
    with np.errstate(invalid="ignore", over="ignore"):
        yield


def clients(count, shape, dtype=torch.float32, spread=1.0):
    """Answers that agree but for noise, each row on a level of its own as logits are."""
    common = torch.randn(shape)
    return [
        (common + spread * torch.randn(shape) + torch.randn(*shape[:-1], 1)).to(dtype) for _ in range(count)
    ]


def centred(x):
    return x.double() - x.double().mean(-1, keepdim=True)


def cost(z, xs):
    return sum((centred(z) - centred(x)).norm(dim=-1) for x in xs)


def assert_rounded(got, truth, xs):
    """Float32 sums, rounded once to the clients' dtype."""
    size = max(float(x.double().abs().amax()) for x in xs)
    owed = torch.finfo(got.dtype).eps / 2 * truth.abs() + 16 * torch.finfo(torch.float32).eps * size
    assert ((got.double() - truth).abs() <= owed).all()


@cache
def least_cost(dtype, count, shape):
    """Clients, the same for all backends, and what the oracle's median of them costs."""
    xs = clients(count, shape, dtype)
    stacked = torch.stack([x.flatten(0, -2) for x in xs])
    return xs, stacked, cost(oracles.geometric_median(stacked), stacked)


# A sum takes the interpreter a millisecond, and there are as many as pairs of clients, for each row.
@pytest.mark.interpreted(where=lambda count, shape, **_: count <= 9 and count * math.prod(shape) < 19_000)
@pytest.mark.parametrize(
    ("dtype", "count", "shape"),
    pairwise(DTYPES, [1, 2, 3, 4, 5, 8, 9, 17], [(3, 89), (1, 1), (5, 1031), (2, 2, 700)]),
    ids=str,
)
def test_the_geometric_median_costs_no_more_than_the_oracles(dtype, count, shape, backend, nan_filled_memory):
    xs, stacked, best = least_cost(dtype, count, shape)
    got = geometric_median(xs, backend=backend)
    assert (got.shape, got.dtype) == (shape, dtype)
    # The cost is flat about its minimum: what rounding the result costs is that times the clients at most.
    rounding = count * torch.finfo(dtype).eps * float(got.abs().amax()) * math.sqrt(shape[-1])
    assert (cost(got.flatten(0, -2), stacked) <= best * (1 + 2e-5) + rounding).all()


@pytest.mark.parametrize("count", [3, 8])
def test_the_geometric_median_is_the_oracles_point(count, backend):
    xs = [torch.randn(2, 300) for _ in range(count)]
    truth = oracles.geometric_median(torch.stack(xs))
    assert (centred(geometric_median(xs, backend=backend)) - truth).abs().amax() < 2e-5


@pytest.mark.parametrize("count", [3, 8])
def test_a_whole_tensor_is_one_point_of_centred_rows(count, backend):
    xs = [torch.randn(3, 300) for _ in range(count)]
    together = torch.stack([centred(x).reshape(1, -1) for x in xs])
    truth = oracles.geometric_median(together).reshape(3, 300)
    assert (centred(geometric_median(xs, per_row=False, backend=backend)) - truth).abs().amax() < 2e-5


@pytest.mark.interpreted(
    where=lambda dtype, shape, **_: (dtype, shape) in ((torch.float32, (3, 89)), (torch.float16, (2, 1031)))
)
@pytest.mark.parametrize("shape", [(3, 89), (300, 10), (2, 1031), (70_001,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_krum_and_mixing_are_the_oracles(dtype, shape, backend, device, nan_filled_memory):
    interpreted = backend == "triton" and device == "cpu"
    few = ((9, 3),) if dtype is torch.float32 else ((3, 0),)
    for count, byzantine in few if interpreted else ((3, 0), (9, 2), (9, 3), (14, 4)):
        xs = clients(count, shape, dtype)
        for keep in (2,) if interpreted else (1, count - byzantine):
            got = krum(xs, byzantine, keep=keep, backend=backend)
            assert got.dtype == dtype
            assert_rounded(got, oracles.krum(xs, byzantine, keep), xs)
        truth = oracles.nearest_neighbour_mixing(xs, byzantine)
        for got, expected in zip(
            nearest_neighbour_mixing(xs, byzantine, backend=backend), truth, strict=True
        ):
            assert_rounded(got, expected, xs)


def test_krum_returns_a_client_to_the_bit_and_the_first_of_equals(backend):
    xs = [torch.randn(3, 41) for _ in range(7)]
    got = krum(xs, 2, backend=backend)
    assert any(torch.equal(got, x) for x in xs)
    level = torch.arange(3.0)[:, None]
    shifted = [xs[0] + 0 * level, xs[0].clone(), xs[0].clone(), xs[3] * 9, xs[4] * 9]
    assert torch.equal(krum(shifted, 1, backend=backend), shifted[0])


# From 2^13 to 2^14 floats are 2^-10 apart: the clients differ by a few of those steps.
@pytest.mark.interpreted(where=lambda shape, **_: shape == (2, 500))
@every_rule
@pytest.mark.parametrize("shape", [(2, 500), (1, 70_000)], ids=str)
def test_nearly_equal_clients_far_from_the_origin_keep_their_digits(rule, shape, backend):
    base = 2**13 * (1 + 0.9 * torch.rand(shape))
    xs = [base + 2**-10 * torch.randint(-3, 4, shape) for _ in range(7)]
    exact = [(x.double() - base.double()) * 1024 for x in xs]  # integers, for the reference
    expected = rule(exact, 2, backend="reference") / 1024
    got = rule(xs, 2, backend=backend).double() - base.double()
    assert (got - expected).abs().amax() <= 2**-10 * 0.51  # half a step: the rounding of the result


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_clients_give_themselves(dtype, rule, backend):
    x = torch.randn(3, 77).to(dtype)
    assert (rule([x.clone() for _ in range(5)], 1, backend=backend) == x).all()


@pytest.mark.interpreted(where=lambda size, **_: size == 1e25 or size != size)
@pytest.mark.parametrize(
    ("rule", "size", "where"),
    [
        (RULES[name], *rest)
        for name, *rest in pairwise(list(RULES), [1e2, 1e6, 1e15, 1e25, INF, math.nan], [(0, 1), (3, 6)])
    ],
)
def test_outliers_do_not_move_it(where, size, rule, backend):
    """The rule of honest clients and of two liars stays where the honest are."""
    honest = clients(5, (2, 90))
    xs = list(honest)
    for index in where:
        xs.insert(index, torch.randn(2, 90) * size)
    got = rule(xs, 2, backend=backend)
    if got.dim() == 3:  # what the liars themselves are mixed into is up to them
        got = got[[i for i in range(7) if i not in where]]
    assert got.isfinite().all()
    radius = max(float(cost(x, [y]).amax()) for x in honest for y in honest)
    for z in got.reshape(-1, 2, 90):
        assert float(cost(z, honest[:1]).amax()) <= 2 * radius


@pytest.mark.parametrize(("liars", "size"), [(1, 1e9), (2, 1e6), (3, 1e3), (3, 1e9)])
def test_outliers_pull_as_far_as_the_oracles(liars, size, backend):
    honest = [torch.randn(2, 200) for _ in range(5)]
    xs = [torch.randn(2, 200) * size for _ in range(liars)] + honest
    truth = oracles.geometric_median(torch.stack(xs))
    got = centred(geometric_median(xs, backend=backend))
    assert (got - truth).abs().amax() < 1e-4


@every_rule
def test_order_of_clients_is_irrelevant(rule, backend):
    xs = clients(8, (2, 61))
    order = torch.randperm(8).tolist()
    forth, back = rule(xs, 2, backend=backend), rule([xs[i] for i in order], 2, backend=backend)
    forth = forth[order] if forth.dim() == 3 else forth
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=1e-5)


@every_rule
def test_a_translation_of_all_moves_the_result_along(rule, backend):
    xs, step = clients(7, (2, 61)), torch.randint(-8, 9, (2, 61))
    forth, moved = rule(xs, 2, backend=backend), rule([x + step for x in xs], 2, backend=backend)
    torch.testing.assert_close(moved, forth + step, rtol=1e-5, atol=1e-5)


@every_rule
def test_a_level_of_its_own_for_each_row_of_each_client_changes_no_choice(rule, backend):
    xs = clients(7, (4, 61))
    levels = [torch.randint(-100, 101, (4, 1)) for _ in xs]
    forth = rule(xs, 2, backend=backend)
    moved = rule([x + level for x, level in zip(xs, levels, strict=True)], 2, backend=backend)
    assert (centred(moved) - centred(forth)).abs().amax() < 1e-3


@every_rule
def test_the_unit_does_not_matter(rule, backend):
    xs = clients(7, (4, 61))
    plain = rule(xs, 2, backend=backend)
    for unit in (2.0**-30, 2.0**30):
        scaled = rule([x * unit for x in xs], 2, backend=backend) / unit
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)


def test_a_majority_in_one_place_is_the_geometric_median(backend):
    place = torch.randn(3, 50)
    xs = [torch.randn(3, 50), place, torch.randn(3, 50) * 100, place.clone(), place.clone()]
    assert torch.equal(geometric_median(xs, backend=backend), place)


def test_a_client_amid_the_others_is_the_geometric_median(backend):
    """Where Weiszfeld's weights have a pole, and the mean, where iterations tend to start, is too."""
    middle, x, y = torch.randn(3, 2, 40)
    xs = [middle, middle + x, middle - x, middle + 3 * y, middle - 3 * y]
    torch.testing.assert_close(geometric_median(xs, backend=backend), middle, rtol=1e-6, atol=1e-6)


def test_a_client_next_to_the_minimum_does_not_catch_it(backend):
    """The corners of a quadrilateral, whose diagonals cross near one of them."""
    corners = torch.tensor([[[0.0, 0, 0]], [[3.0, -3, 0]], [[4.0, 4, -8]], [[0.9, 1.1, -2.0]]])
    truth = oracles.geometric_median(corners, steps=20_000)
    got = geometric_median(list(corners), backend=backend)
    assert float(cost(got, corners)) <= float(cost(truth, corners)) * (1 + 1e-5)


def test_two_clients_meet_halfway(backend):
    a, b = torch.randn(2, 3, 50)
    torch.testing.assert_close(geometric_median([a, b], backend=backend), (a + b) / 2)


def test_rows_of_the_geometric_median_are_independent(backend):
    xs = clients(5, (4, 300))
    whole = geometric_median(xs, backend=backend)
    for part in (slice(0, 1), slice(2, 4)):
        torch.testing.assert_close(geometric_median([x[part] for x in xs], backend=backend), whole[part])


def test_a_client_that_is_nan_in_a_row_has_no_say_in_that_row_only(backend):
    xs = clients(5, (3, 700))
    without = geometric_median(xs[1:], backend=backend)
    expected = geometric_median(xs, backend=backend)
    expected[1] = without[1]
    xs[0][1, 650] = math.nan
    torch.testing.assert_close(geometric_median(xs, backend=backend), expected, rtol=1e-5, atol=1e-5)


def test_where_all_are_nan_so_is_the_row(backend):
    xs = clients(4, (3, 70))
    for x in xs:
        x[1, 5] = -INF
    assert geometric_median(xs, backend=backend).isnan().all(-1).tolist() == [False, True, False]
    assert geometric_median(xs, per_row=False, backend=backend).isnan().all()


def test_a_client_of_nan_is_mixed_into_the_first_of_the_others(backend):
    xs = clients(5, (3, 70))
    xs[1].fill_(math.nan)
    mixed = nearest_neighbour_mixing(xs, 2, backend=backend)
    assert all(x.isfinite().all() for x in mixed)
    torch.testing.assert_close(mixed[1], (xs[0] + xs[2] + xs[3]) / 3)


def test_more_liars_than_were_allowed_for_show(backend):
    xs = [torch.full((2, 9), math.nan)] * 3 + clients(2, (2, 9))
    assert all(x.isnan().all() for x in nearest_neighbour_mixing(xs, 1, backend=backend))
    assert krum(xs, 1, backend=backend).isfinite().all()  # the others come first all the same
    assert krum(xs, 1, keep=3, backend=backend).isnan().all()


@every_rule
def test_the_smallest_sizes(rule, backend):
    for shape in ((0, 5), (4, 0), (0,), (), (1,), (2, 1)):
        got = rule([torch.ones(shape) for _ in range(5)], 1, backend=backend)
        assert torch.equal(got, torch.ones((5, *shape) if got.dim() > len(shape) else shape)), shape


@pytest.mark.interpreted(where=lambda first, **_: first == 2)
@every_rule
@pytest.mark.parametrize("first", [0, 2], ids=["rows first", "transposed first"])
def test_strides_do_not_matter(first, rule, backend):
    def laid_out(index):
        whole = torch.randn(8, 8)
        return [whole[::2], whole[:, ::2].T, whole.T[:4], whole[:1].expand(4, 8)][(first + index) % 4]

    xs = [laid_out(index) for index in range(5)]
    got = rule(xs, 1, backend=backend)
    assert got.is_contiguous()
    assert torch.equal(got, rule([x.contiguous() for x in xs], 1, backend=backend))


@pytest.mark.cpu("threads are a CPU's")
@pytest.mark.interpreted(where=lambda **_: False)
@every_rule
@pytest.mark.parametrize("shape", [(1, 140_001), (200, 999)], ids=str)
def test_the_number_of_threads_changes_nothing(shape, rule, backend):
    xs = clients(5, shape)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(rule(xs, 1, backend=backend))
    assert all(torch.equal(other, results[0]) for other in results)


@pytest.mark.cpu("instruction sets are a CPU's")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 8, 13])
def test_every_instruction_set_agrees(count, dtype):
    """This machine runs the best it has; others run the rest."""
    xs = clients(count, (7, 1003), dtype)
    results = []
    for index, _ in enumerate(library().instruction_sets()):
        got = torch.empty_like(xs[0])
        given = _native._clients(xs)
        library().geometric_median_cpu(given, True, 1e-6, 64, got.data_ptr(), 1, set=index)
        results.append(got)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.skipif("triton" not in available_backends(OPERATOR), reason="needs triton")
@pytest.mark.parametrize("columns", [1, 4])
def test_triton_puts_the_parts_of_a_drifting_row_together(columns, monkeypatch):
    """Differences wander along the row, so that each part has a mean of its own."""
    from feddistill_kernels.distances import _triton

    monkeypatch.setattr(_triton, "interpreted", lambda: columns == 1)
    drift = torch.linspace(-30, 30, 5003)
    xs = [torch.randn(1, 5003) + index * drift + 1000 * index for index in range(4)]
    for per_row in (True, False):
        truth = geometric_median([x.double() for x in xs], per_row=per_row)
        got = geometric_median(xs, per_row=per_row, backend="triton")
        assert (got - truth).abs().amax() < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda xs: geometric_median([]), "xs must hold at least one tensor"),
        (
            lambda xs: krum(xs[:4] + [torch.zeros(2)], 1),
            r"xs\[4\] is float32 \[2\] on .* but xs\[0\]",
        ),
        (lambda xs: geometric_median(xs, tolerance=-1.0), "tolerance must not be negative, got -1"),
        (lambda xs: geometric_median(xs, tolerance=math.nan), "tolerance must not be negative, got nan"),
        (lambda xs: geometric_median(xs, max_iterations=0), "max_iterations must be positive, got 0"),
        (lambda xs: krum(xs, 2), r"at least 2 \* byzantine \+ 3 clients, got byzantine=2 and 5 clients"),
        (lambda xs: krum(xs, -1), "byzantine >= 0 .*got byzantine=-1"),
        (lambda xs: krum(xs, 1, keep=0), r"keep must be in \[1, 4\], clients less byzantine ones, got 0"),
        (lambda xs: krum(xs, 1, keep=5), r"keep must be in \[1, 4\]"),
        (lambda xs: nearest_neighbour_mixing(xs, 3), r"byzantine must be in \[0, 2\] for 5 clients, got 3"),
        (lambda xs: nearest_neighbour_mixing(xs, -1), r"byzantine must be in \[0, 2\] for 5 clients, got -1"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call([torch.zeros(3)] * 5)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_backward_pass_is_refused(rule):
    xs = [torch.randn(2, 3, requires_grad=True) for _ in range(5)]
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        rule(xs, 1).sum().backward()
