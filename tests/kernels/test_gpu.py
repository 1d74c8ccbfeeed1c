"""What only a GPU shows: graphs, streams, a host that does not wait, more numbers than an int32 counts.

Nothing sets a default device here: a tensor that an operator forgot on the CPU is found.
"""

import math

import pytest
import torch
from kernels import oracles

from feddistill_kernels import (
    TeacherHead,
    TopK,
    aggregate_topk,
    available_backends,
    coordinate_median,
    distillation_loss,
    geometric_median,
    kinds,
    krum,
    linear_distillation_loss,
    mean_around_median,
    nearest_neighbour_mixing,
    softmax_divergence,
    topk_compress,
    trimmed_mean,
)

pytestmark = pytest.mark.gpu
INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, V, H, K = 48, 3001, 64, 8


@pytest.fixture(autouse=True)
def no_default_device(device):
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(device)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda", dtype=dtype)


def teacher_and_student(dtype, leaf=True):
    return [(3 * randn(N, V)).to(dtype).requires_grad_(leaf), (3 * randn(N, V)).to(dtype)]


def answers(dtype):
    logits = [2 * randn(N, V).to(dtype) for _ in range(5)]
    kept = [topk_compress(z, K, backend="reference") for z in logits]
    return [x for client in kept for x in (client.ids, client.log_probs, client.log_tail)]


def clients(dtype):
    common = randn(N, V)
    return [(common + 0.1 * randn(N, V)).to(dtype) for _ in range(5)]


def with_gradient(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def loss(backend, student, teacher, **settings):
    return with_gradient(distillation_loss(student, teacher, backend=backend, **settings), student)


def loss_in_place(backend, student, teacher):
    return with_gradient(distillation_loss(student * 1, teacher, inplace=True, backend=backend), student)


def loss_of_rows(backend, student, teacher):
    each = distillation_loss(student, teacher, kind="reverse_kl", reduction="none", backend=backend)
    return with_gradient(each.sum(), student)


def labelled(backend, student, teacher, labels, weight):
    settings = {"kd_weight": 0.5, "row_weight": weight, "kind": "jsd", "temperature": 2.0}
    return with_gradient(distillation_loss(student, teacher, labels, **settings, backend=backend), student)


def of_topk(backend, student, ids, log_probs, log_tail):
    return loss(backend, student, TopK(ids, log_probs, log_tail, V))


def compressed(backend, logits):
    got = topk_compress(logits, 64, temperature=2.0, backend=backend)
    return [got.ids, got.log_probs, got.log_tail]


def aggregated(rule, **settings):
    def run(backend, *parts):
        given = [TopK(*parts[i : i + 3], V) for i in range(0, len(parts), 3)]
        got = aggregate_topk(given, rule, backend=backend, **settings)
        return [got.ids, got.log_probs, got.log_tail]

    return run


def linear(backend, hidden, weight, teacher_hidden, teacher_weight):
    value = linear_distillation_loss(
        hidden, weight, TeacherHead(teacher_hidden, teacher_weight), workspace_bytes=1 << 18, backend=backend
    )
    return with_gradient(value, hidden, weight)


def head(dtype):
    # Products in float32 are too exact to show another chunk, and too many to differ by more than rounding.
    parts = [randn(N, H), randn(V, H) / 8, randn(N, H), randn(V, H) / 8]
    return [x.to(dtype).requires_grad_(i < 2) for i, x in enumerate(parts)]


def kept(dtype):
    student, teacher = teacher_and_student(dtype)
    topk = topk_compress(teacher, 64, backend="reference")
    return [student, topk.ids, topk.log_probs, topk.log_tail]


def with_labels(dtype):
    labels, weight = torch.randint(V, (N,), device="cuda"), torch.rand(N, device="cuda")
    labels[3], weight[5] = -100, 0
    return [*teacher_and_student(dtype), labels, weight]


# Name: operator, inputs of a dtype, what is made of them on a backend.
CALLS = {
    "loss": ("distillation", teacher_and_student, loss),
    "loss in place": ("distillation", teacher_and_student, loss_in_place),
    "loss of rows": ("distillation", teacher_and_student, loss_of_rows),
    "loss with labels": ("distillation", with_labels, labelled),
    "loss of TopK": ("distillation", kept, of_topk),
    "divergence": (
        "distillation",
        lambda dtype: teacher_and_student(dtype, leaf=False),
        lambda backend, s, t: [softmax_divergence(s, t, backend=backend)],
    ),
    "topk": ("topk", lambda dtype: [randn(N, V).to(dtype)], compressed),
    "median": ("order_statistics", clients, lambda backend, *xs: [coordinate_median(xs, backend=backend)]),
    "trimmed mean": (
        "order_statistics",
        clients,
        lambda backend, *xs: [trimmed_mean(xs, 1, backend=backend)],
    ),
    "mean around median": (
        "order_statistics",
        clients,
        lambda backend, *xs: [mean_around_median(xs, 3, backend=backend)],
    ),
    "geometric median": (
        "distances",
        clients,
        lambda backend, *xs: [geometric_median(xs, backend=backend)],
    ),
    "krum": ("distances", clients, lambda backend, *xs: [krum(xs, 1, backend=backend)]),
    "mixing": (
        "distances",
        clients,
        lambda backend, *xs: nearest_neighbour_mixing(xs, 1, backend=backend),
    ),
    "aggregate": ("aggregation", answers, aggregated("median")),
    "aggregate by Krum": ("aggregation", answers, aggregated("krum", byzantine=1)),
    "linear loss": ("linear_distillation", head, linear),
}


def pytest_generate_tests(metafunc):
    """Each call on each backend but the reference, which is written to be read."""
    if "call" in metafunc.fixturenames:
        device = metafunc.config.getoption("--device")
        written = [
            pytest.param(name, backend, id=f"{name}-{backend}")
            for name, (operator, *_) in CALLS.items()
            for backend in available_backends(operator, device)
            if backend != "reference"
        ]
        metafunc.parametrize(("call", "backend"), written)


def assert_same(got, expected, rtol=0.0, atol=0.0):
    for x, y in zip(got, expected, strict=True):
        assert x.is_cuda
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree(call, backend, dtype):
    """Each with the reference, on the same tensors."""
    _, make, run = CALLS[call]
    inputs = make(dtype)
    got, expected = run(backend, *inputs), run("reference", *inputs)
    rounding = 4 * torch.finfo(dtype).eps
    for x, y in zip(got, expected, strict=True):
        size = float(y.abs().max()) if y.is_floating_point() else 0
        assert_same([x], [y], rtol=1e-4, atol=max(1e-5, rounding) * size)


def test_the_host_does_not_wait(call, backend):
    _, make, run = CALLS[call]
    inputs = make(torch.bfloat16)
    run(backend, *inputs)  # compiling may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(backend, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_on_other_numbers(call, backend):
    _, make, run = CALLS[call]
    inputs, others = make(torch.bfloat16), make(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(backend, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(backend, *inputs)
    for given in (inputs, others, others):
        with torch.no_grad():
            for x, y in zip(inputs, given, strict=True):
                x.copy_(y)
        graph.replay()
        assert_same(captured, run(backend, *given))


def test_the_current_stream_is_the_one(call, backend):
    """Its inputs come late: on another stream it would read what was there before."""
    _, make, run = CALLS[call]
    inputs = make(torch.bfloat16)
    expected = run(backend, *inputs)
    late = [torch.zeros_like(x).requires_grad_(x.requires_grad) for x in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # some 0.1 s
        with torch.no_grad():
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
        got = run(backend, *late)
    torch.cuda.synchronize()
    assert_same(got, expected)


def test_twice_is_the_same_to_the_bit(call, backend):
    _, make, run = CALLS[call]
    inputs = make(torch.float32)
    assert_same(run(backend, *inputs), run(backend, *inputs))


SMALL = [(1, 1), (3, 7), (5, 129), (2, 4099)]


@pytest.mark.parametrize("shape", SMALL, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_small_shapes(backend, shape):
    """A few of everything, for compute-sanitizer, under which all else would take hours."""
    n, vocab = shape

    def has(operator):
        return backend in available_backends(operator, "cuda")

    student, teacher = randn(n, vocab).requires_grad_(), randn(n, vocab)
    topk = topk_compress(teacher, min(5, vocab), backend="reference")
    labels = torch.zeros(n, dtype=torch.int64, device="cuda")
    for given in (teacher, topk):
        for dtype in DTYPES:
            if has("distillation"):
                leaf = student.detach().to(dtype).requires_grad_()
                value = distillation_loss(leaf, given, labels, kind="jsd", kd_weight=0.5, backend=backend)
                assert all(x.isfinite().all() for x in with_gradient(value, leaf))
    xs = [randn(n, vocab) for _ in range(5)]
    if has("topk"):
        for dtype in DTYPES:
            got = topk_compress(teacher.to(dtype), min(5, vocab), backend=backend)
            assert got.log_probs.isfinite().all()
    if has("order_statistics"):
        assert coordinate_median([x.bfloat16() for x in xs], backend=backend).isfinite().all()
        assert mean_around_median(xs, 2, backend=backend).isfinite().all()
    if has("distances"):
        assert geometric_median(xs, backend=backend).isfinite().all()
        assert krum(xs, 1, backend=backend).isfinite().all()
    if has("aggregation"):
        got = aggregate_topk([topk] * 5, "median", backend=backend)
        assert got.log_probs.isfinite().all()


@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_rows_of_llama_agree_with_the_oracle(backend, kind, dtype, compressed, n):
    """One row over many programs, and many rows."""
    if backend not in available_backends("distillation", "cuda"):
        pytest.skip(f"{backend} does not run the loss here")
    vocab = 128_256
    student, teacher = (2 * randn(n, vocab)).to(dtype), (2 * randn(n, vocab)).to(dtype)
    settings = {"kind": kind, "beta": 0.5, "temperature": 2.0}
    given = topk_compress(teacher, 64, temperature=2.0, backend="reference") if compressed else teacher

    def truth(leaf, rows):
        if compressed:
            part = given[rows]
            return oracles.truncated(leaf, part.ids, part.log_probs, part.log_tail, vocab, **settings)
        return oracles.divergence(leaf, teacher[rows], **settings)

    leaf = student.clone().requires_grad_()
    each = softmax_divergence(leaf, given, **settings, backend=backend)
    upstream = torch.rand(n, device="cuda") + 0.5
    (slope,) = torch.autograd.grad(each, leaf, upstream)
    rows = slice(max(0, n - 4), n)
    wide = student[rows].double().requires_grad_()
    true = truth(wide, rows)
    (true_slope,) = torch.autograd.grad(true, wide, upstream[rows].double())
    torch.testing.assert_close(each[rows].double(), true, rtol=2e-5, atol=1e-6)
    size = float(true_slope.abs().max())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(slope[rows].double(), true_slope, rtol=eps, atol=max(2e-5, eps / 64) * size)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_row_that_rules_everything_out_is_nan_and_no_other(name):
    for backend in available_backends("distillation", "cuda"):
        tensors = {"student": randn(3, 700), "teacher": randn(3, 700)}
        tensors[name][1] = -INF
        leaf = tensors["student"].requires_grad_()
        each = softmax_divergence(leaf, tensors["teacher"], backend=backend)
        (slope,) = torch.autograd.grad(each.sum(), leaf)
        assert each.isnan().tolist() == [False, True, False], backend
        assert slope.isfinite().all(-1).tolist() == [True, False, True], backend


def test_a_row_without_a_choice_is_compressed_to_nan():
    for backend in available_backends("topk", "cuda"):
        logits = randn(3, 700)
        logits[1] = -INF
        got = topk_compress(logits, 5, backend=backend)
        assert got.log_probs.isnan().any(-1).tolist() == [False, True, False], backend
        assert all(len(set(row)) == 5 and set(row) <= set(range(700)) for row in got.ids.tolist()), backend


def test_a_label_or_id_outside_the_vocabulary_is_nan_in_its_row():
    """The reference indexes with it: there PyTorch stops the program."""
    for backend in available_backends("distillation", "cuda"):
        if backend == "reference":
            continue
        student, teacher = randn(3, 700), randn(3, 700)
        labels = torch.tensor([0, 700, 699], device="cuda")
        settings = {"reduction": "none", "backend": backend}
        got = distillation_loss(student, teacher, labels, kd_weight=0.5, **settings)
        assert got.isnan().tolist() == [False, True, False], backend
        kept = topk_compress(teacher, 5)
        kept.ids[2, 4] = 2**30
        got = distillation_loss(student, kept, **settings)
        assert got.isnan().tolist() == [False, False, True], backend


def room_for(gigabytes):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"{free / 1e9:.0f} GB are free, it takes {gigabytes}")


MANY, WIDE = 17_000, 131_072
"""Rows and columns: 2.2e9 numbers, 4.5 GB of bfloat16."""


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "topk"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_loss_of_more_than_2_to_the_31_numbers(backend, compressed):
    if backend not in available_backends("distillation", "cuda"):
        pytest.skip(f"{backend} does not run the loss here")
    room_for(30)
    student, teacher = (randn(MANY, WIDE, dtype=torch.bfloat16) for _ in range(2))
    given = topk_compress(teacher, 64) if compressed else teacher
    leaf = student.requires_grad_()
    each = softmax_divergence(leaf, given, backend=backend)
    (slope,) = torch.autograd.grad(each.sum(), leaf)
    assert each.isfinite().all()
    for rows in (slice(0, 3), slice(MANY - 3, MANY)):
        part = student.detach()[rows].clone().requires_grad_()
        alone = softmax_divergence(part, given[rows], backend="reference")
        torch.testing.assert_close(each[rows], alone, rtol=1e-4, atol=1e-5)
        (expected,) = torch.autograd.grad(alone.sum(), part)
        torch.testing.assert_close(slope[rows], expected, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_compression_of_more_than_2_to_the_31_numbers(backend):
    if backend not in available_backends("topk", "cuda"):
        pytest.skip(f"{backend} does not compress here")
    room_for(10)
    logits = randn(MANY, WIDE, dtype=torch.bfloat16)
    got = topk_compress(logits, 64, backend=backend)
    for rows in (slice(0, 3), slice(MANY - 3, MANY)):
        alone = topk_compress(logits[rows], 64, backend="reference")
        assert torch.equal(got.ids[rows], alone.ids)
        torch.testing.assert_close(got.log_probs[rows], alone.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_median_of_more_than_2_to_the_31_numbers(backend):
    if backend not in available_backends("order_statistics", "cuda"):
        pytest.skip(f"{backend} takes no median here")
    room_for(30)
    xs = [randn(MANY * WIDE, dtype=torch.bfloat16) for _ in range(3)]
    got = coordinate_median(xs, backend=backend)
    for part in (slice(0, 5000), slice(2**31 - 2000, 2**31 + 2000), slice(MANY * WIDE - 5000, None)):
        assert torch.equal(got[part], coordinate_median([x[part] for x in xs], backend="reference"))
