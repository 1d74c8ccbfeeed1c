"""The operators are what they tell torch.compile they are."""

import pytest
import torch

from feddistill_kernels import (
    aggregate_topk,
    coordinate_median,
    distillation_loss,
    geometric_median,
    krum,
    mean_around_median,
    nearest_neighbour_mixing,
    softmax_divergence,
    topk_compress,
    use_backend,
)

OPS = torch.ops.feddistill
NUMBERS = (11, "jsd", 0.3, 2.0, 1.0, 0.5, "reference")


def rows(compressed):
    student, logits = torch.randn(4, 13, requires_grad=True), torch.randn(4, 11)
    labels, scale = torch.tensor([1, 2, 0, 10]), torch.tensor([1.0, 0.0, 2.0, 0.5])
    if not compressed:
        return (student, logits, None, None, labels, scale, *NUMBERS)
    kept = topk_compress(logits, 3)
    return (student, kept.log_probs, kept.ids, kept.log_tail, labels, scale, *NUMBERS)


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "topk"])
@pytest.mark.parametrize("op", ["loss", "gradient", "fused", "fused_"])
def test_opcheck_of_the_loss(op, compressed):
    arguments = rows(compressed)
    if op in ("gradient", "fused_"):  # neither has a gradient of its own
        arguments = (arguments[0].detach(), *arguments[1:])
    torch.library.opcheck(getattr(OPS, f"distillation_{op}").default, arguments)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_opcheck_of_the_others(backend):
    xs = [torch.randn(3, 5) for _ in range(4)]
    kept = [topk_compress(x, 2) for x in xs]
    torch.library.opcheck(OPS.trimmed_mean.default, (xs, 1, backend))
    torch.library.opcheck(OPS.mean_around_median.default, (xs, 2, backend))
    torch.library.opcheck(OPS.geometric_median.default, (xs, True, 1e-6, 64, backend))
    torch.library.opcheck(OPS.krum.default, (xs, 0, 2, backend))
    torch.library.opcheck(OPS.nearest_neighbour_mixing.default, (xs, 1, backend))
    torch.library.opcheck(OPS.topk_compress.default, (xs[0], 2, 1.0, True, backend))
    torch.library.opcheck(OPS.distillation_scaled.default, (xs[0], torch.tensor(0.5), backend))
    torch.library.opcheck(OPS.distillation_rescale_.default, (xs[1], torch.tensor(0.5), backend))
    parts = ([k.ids for k in kept], [k.log_probs for k in kept], [k.missing_log_prob() for k in kept])
    for rule, mix in (("median", None), ("geometric_median", None), ("krum", 1)):
        settings = (rule, 1, 1, 0, 1e-6, 8, mix)
        torch.library.opcheck(OPS.aggregate_topk.default, (*parts, 5, None, 5, *settings, backend))


@pytest.fixture
def compiled():
    """The whole of a function as one graph, forward and backward, without waiting for a C++ compiler."""
    torch._dynamo.reset()
    return lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "topk"])
def test_the_compiled_loss_is_the_loss(compressed, reduction, compiled):
    student, teacher = torch.randn(4, 11, requires_grad=True), torch.randn(4, 11)
    given = topk_compress(teacher, 3) if compressed else teacher
    labels, weight = torch.tensor([1, -100, 3, 0]), torch.rand(4)

    def loss(student, teacher, labels, weight):
        return distillation_loss(
            student, teacher, labels, kind="jsd", kd_weight=0.6, row_weight=weight, reduction=reduction
        )

    results = [f(student, given, labels, weight) for f in (loss, compiled(loss))]
    upstream = torch.randn_like(results[0])
    slopes = [torch.autograd.grad(r, student, upstream)[0] for r in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*slopes)


def test_a_compiled_divergence_takes_other_sizes_and_temperatures(compiled):
    function = compiled(lambda s, t, temperature: softmax_divergence(s, t, temperature=temperature))
    for n, temperature in ((2, 1.0), (3, 2.0), (5, 2.5), (7, 0.5)):
        student, teacher = torch.randn(2, n, 9)
        expected = softmax_divergence(student, teacher, temperature=temperature)
        torch.testing.assert_close(function(student, teacher, temperature), expected)


def test_compression_and_aggregation_compile(compiled):
    def federation(xs):
        clients = [topk_compress(x, 3) for x in xs]
        return (
            coordinate_median(xs),
            mean_around_median(xs, 2),
            aggregate_topk(clients, "median").expand(),
            aggregate_topk(clients, "krum", byzantine=0, mix=1).expand(),
        )

    xs = [torch.randn(4, 9) for _ in range(3)]
    for got, expected in zip(compiled(federation)(xs), federation(xs), strict=True):
        torch.testing.assert_close(got, expected)


def test_distance_rules_compile(compiled):
    def federation(xs):
        return geometric_median(xs), krum(nearest_neighbour_mixing(xs, 1), 1)

    xs = [torch.randn(4, 9) for _ in range(5)]
    for got, expected in zip(compiled(federation)(xs), federation(xs), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_compiled_function_follows_use_backend(compiled):
    xs = [torch.randn(5) for _ in range(3)]
    function = compiled(coordinate_median)
    with use_backend("reference"):
        first = function(xs)
    torch.testing.assert_close(function(xs), first)


def test_in_place_under_the_compiler_is_refused(compiled):
    def loss(student, teacher):
        return distillation_loss(student * 1, teacher, inplace=True)

    with pytest.raises(Exception, match="inplace=True is for eager mode"):
        compiled(loss)(torch.randn(2, 5, requires_grad=True), torch.randn(2, 5))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # Inductor's own
def test_the_compiler_of_this_machine_agrees_too():
    """Once through Inductor and its compiler, where the others stop at the graph."""
    torch._dynamo.reset()
    student, teacher = torch.randn(4, 11, requires_grad=True), torch.randn(4, 11)
    loss = distillation_loss(student, teacher, kind="reverse_kl")
    same = torch.compile(distillation_loss, fullgraph=True)(student, teacher, kind="reverse_kl")
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (same, loss)))
