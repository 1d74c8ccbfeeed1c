"""What users do that the kernels' own tests do not: other defaults, other layouts, a second derivative."""

import math

import pytest
import torch

from feddistill_kernels import (
    TopK,
    aggregate_topk,
    available_backends,
    coordinate_median,
    distillation_loss,
    geometric_median,
    krum,
    linear_distillation_loss,
    nearest_neighbour_mixing,
    softmax_divergence,
    topk_compress,
)


def backend_or_skip(operator, backend, device):
    if backend not in available_backends(operator, device):
        pytest.skip(f"no {backend} backend here")
    return backend


@pytest.fixture
def other_default(request):
    dtype, place = request.param
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(place)
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


DEFAULTS = [(torch.float64, None), (torch.bfloat16, None), (torch.float32, "meta")]


@pytest.mark.parametrize("other_default", DEFAULTS, indirect=True, ids=str)
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_a_default_dtype_or_device_changes_nothing(other_default, backend, device):
    draw = {"generator": torch.Generator(device).manual_seed(0), "dtype": torch.float32, "device": device}
    logits, others = torch.randn(2, 300, **draw), torch.randn(2, 300, **draw)
    backend_or_skip("topk", backend, device)
    found = topk_compress(logits, 4, backend=backend)
    wanted = topk_compress(logits, 4, backend="reference")
    assert found.log_probs.dtype == found.log_tail.dtype == torch.float32
    torch.testing.assert_close(found.log_tail, wanted.log_tail, rtol=1e-5, atol=1e-5)
    both = [found, topk_compress(others, 4, backend=backend)]
    for rule in ("mean_probs", "median", "geometric_median"):
        backend_or_skip("aggregation", backend, device)
        merged, again = (aggregate_topk(both, rule, backend=b) for b in (backend, "reference"))
        torch.testing.assert_close(merged.log_probs, again.log_probs, rtol=1e-4, atol=1e-4)
    student = logits.clone().requires_grad_()
    distillation_loss(student, others, backend=backend).backward()
    slow = logits.clone().requires_grad_()
    distillation_loss(slow, others, backend="reference").backward()
    torch.testing.assert_close(student.grad, slow.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.interpreted(where=lambda level, place, **_: (level, place) in ((1e5, 6), (1e9, 0)))
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize(
    ("level", "place"), [(1e5, 0), (1e5, 6), (1e8, 3), (1e8, 0), (1e9, 0), (1e9, 6), (1e12, 3), (1e12, 6)]
)
def test_nobody_is_near_for_being_far_by_a_constant(level, place, backend, device):
    """All rows of one number are, centred, a row of zeros: far from clients that know something."""
    backend_or_skip("distances", backend, device)
    generator = torch.Generator(device).manual_seed(0)
    known = 5 * torch.randn(2, 600, generator=generator, device=device)
    honest = [known + 0.1 * torch.randn(2, 600, generator=generator, device=device) for _ in range(6)]
    clients = [*honest[:place], torch.full_like(known, level), *honest[place:]]
    assert krum(clients, byzantine=1, backend=backend).abs().max() < 100
    mixed = nearest_neighbour_mixing(clients, byzantine=1, backend=backend)
    for client, result in enumerate(mixed):
        assert client == place or result.abs().max() < 100
    median = geometric_median(clients, backend=backend)
    # The constant passes through with the liar's weight, and beyond 1e8 takes the digits of what is combined.
    centred = median - median.mean(-1, keepdim=True)
    assert (centred - (known - known.mean(-1, keepdim=True))).norm() < 0.1 * known.norm() or level > 1e8


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_large_level_changes_no_distance(backend, device):
    backend_or_skip("distances", backend, device)
    generator = torch.Generator(device).manual_seed(1)
    clients = [torch.randn(3, 2000, generator=generator, device=device) for _ in range(5)]
    lifted = [x.double() + 2.0 ** (10 * i) for i, x in enumerate(clients)]
    rounded = [x.float() for x in lifted]
    # What is left of each after its level has taken its digits is what distances are between.
    exact = [(x.double() - 2.0 ** (10 * i)).float() for i, x in enumerate(rounded)]
    chosen = krum(rounded, byzantine=1, backend=backend)
    wanted = krum(exact, byzantine=1, backend="reference")
    centred = chosen.double() - chosen.double().mean(-1, keepdim=True)
    torch.testing.assert_close(
        centred, wanted.double() - wanted.double().mean(-1, keepdim=True), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_a_second_derivative_is_refused(backend, device):
    backend_or_skip("distillation", backend, device)
    s = torch.randn(3, 9, device=device, requires_grad=True)
    t = torch.randn(3, 9, device=device)
    h, w = torch.randn(3, 5, device=device, requires_grad=True), torch.randn(9, 5, device=device)
    losses = [
        lambda: distillation_loss(s, t, backend=backend),
        lambda: softmax_divergence(s, t, backend=backend).sum(),
        lambda: distillation_loss(s * 1.0, t, inplace=True, backend=backend),
        lambda: linear_distillation_loss(h, w, t, backend=backend),
        lambda: linear_distillation_loss(h, w, t, reduction="none", backend=backend).sum(),
    ]
    for loss in losses:
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss(), h if loss in losses[3:] else s, create_graph=True)
        torch.autograd.grad(loss(), h if loss in losses[3:] else s)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch's own, of its forward mode
def test_forward_mode_is_refused(device):
    import torch.autograd.forward_ad as forward

    s, t = torch.randn(3, 9, device=device), torch.randn(3, 9, device=device)
    with forward.dual_level():
        dual = forward.make_dual(s, torch.ones_like(s))
        with pytest.raises(RuntimeError, match="student carries a tangent"):
            softmax_divergence(dual, t)
        with pytest.raises(RuntimeError, match="hidden carries a tangent"):
            linear_distillation_loss(dual, torch.randn(4, 9, device=device), torch.randn(3, 4, device=device))
        assert softmax_divergence(s, t).isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_place_on_part_of_a_padded_head(dtype, backend, device):
    backend_or_skip("distillation", backend, device)
    logits = torch.randn(5, 12, device=device, dtype=dtype)
    teacher = torch.randn(5, 7, device=device, dtype=dtype)
    gradients = []
    for inplace in (True, False):
        leaf = logits.clone().requires_grad_()
        part = (leaf * 1)[:, :7]
        (distillation_loss(part, teacher, inplace=inplace, backend=backend) * 0.5).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-2 if dtype is torch.float16 else 1e-5, atol=1e-4)


def test_rows_that_overlap_are_not_written_over(device):
    memory = torch.randn(30, device=device, requires_grad=True) * 1
    teacher = torch.randn(3, 7, device=device)
    for rows in (
        memory.as_strided((3, 7), (1, 1)),
        memory.as_strided((3, 7), (6, 1)),
        memory[:7].expand(3, 7),
    ):
        with pytest.raises(ValueError, match="do not share memory"):
            distillation_loss(rows, teacher, inplace=True)
    distillation_loss(memory.as_strided((3, 7), (7, 1)), teacher, inplace=True).backward()


@pytest.mark.parametrize(
    "kind", ["forward_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl", "reverse_kl"]
)
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("where", ["kept", "tail"])
def test_nan_in_a_compressed_teacher_is_nan_in_its_row(where, backend, kind, device):
    backend_or_skip("distillation", backend, device)
    kept = topk_compress(torch.randn(3, 30, device=device), 4)
    (kept.log_probs[1] if where == "kept" else kept.log_tail)[1] = math.nan
    student = torch.randn(3, 30, device=device, requires_grad=True)
    loss = softmax_divergence(student, kept, kind=kind, backend=backend)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert student.grad[1].isnan().all()
    assert student.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_a_teacher_in_float64_teaches_a_student_in_float32(backend, device):
    backend_or_skip("distillation", backend, device)
    s, t = torch.randn(4, 20, device=device), torch.randn(4, 20, device=device)
    kept = topk_compress(t, 5)
    wide = TopK(kept.ids, kept.log_probs.double(), kept.log_tail.double(), 20)
    for narrow, other in ((t, t.double()), (kept, wide)):
        found = softmax_divergence(s, other, backend=backend)
        torch.testing.assert_close(
            found, softmax_divergence(s, narrow, backend=backend), rtol=1e-5, atol=1e-6
        )
    hidden, weight = torch.randn(4, 3, device=device), torch.randn(20, 3, device=device)
    assert linear_distillation_loss(hidden, weight, t.double(), backend=backend).isfinite()


@pytest.mark.parametrize("workspace", [None, 1 << 12])
def test_a_likely_token_in_float16_does_not_overflow_the_weights_gradient(workspace, device):
    rows, width, vocab = 8192, 4, 16
    hidden = torch.full((rows, width), 10.0, device=device)
    weight = 0.01 * torch.randn(vocab, width, device=device)
    teacher = torch.zeros(rows, vocab, device=device)
    teacher[:, 3] = 12.0
    gradients = {}
    for dtype in (torch.float16, torch.float32):
        w = weight.to(dtype).requires_grad_()
        b = torch.zeros(vocab, device=device, dtype=dtype, requires_grad=True)
        loss = linear_distillation_loss(
            hidden.to(dtype), w, teacher.to(dtype), bias=b, workspace_bytes=workspace
        )
        loss.backward()
        assert w.grad.dtype == b.grad.dtype == dtype
        gradients[dtype] = torch.cat([w.grad, b.grad[:, None]], 1).float()
    assert gradients[torch.float16].isfinite().all()
    torch.testing.assert_close(*gradients.values(), rtol=1e-2, atol=2e-2)


def test_nobody_asks_for_the_gradient(device):
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return None

    hidden = torch.randn(3, 4, device=device, requires_grad=True)
    loss = linear_distillation_loss(
        hidden, torch.randn(6, 4, device=device), torch.randn(3, 6, device=device)
    )
    Drop.apply(loss).backward()
    assert hidden.grad is None or not hidden.grad.any()


def test_one_tensor_is_no_list_of_clients():
    for rule in (coordinate_median, geometric_median):
        with pytest.raises(ValueError, match=r"got one tensor; list\(xs\) takes it apart"):
            rule(torch.zeros(3, 4))
    kept = topk_compress(torch.randn(2, 9), 3)
    with pytest.raises(ValueError, match="weights must be a tensor, got list"):
        aggregate_topk([kept, kept], "mean_probs", weights=[0.5, 0.5])


class TestStored:
    """Log-probabilities that somebody stored."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_rows_are_distributions(self, dtype):
        torch.manual_seed(0)
        sharp = torch.tensor([8.0, 2.0]).repeat_interleave(1000)[:, None]
        values, ids = (sharp * torch.randn(2000, 500)).log_softmax(-1).topk(50)
        kept = TopK.from_log_probs(ids, values.to(dtype), 500)
        whole = kept.log_probs.double().exp().sum(-1) + kept.log_tail.double().exp()
        assert kept.log_tail.isfinite().all()
        assert (whole - 1).abs().max() < 1e-5
        stored = values.to(dtype).double()
        enough = stored.exp().sum(-1) < 1 - 2 * torch.finfo(dtype).eps
        assert enough.any()
        assert torch.equal(kept.log_probs[enough], stored[enough].float())

    def test_a_whole_row_has_no_tail(self):
        logits = torch.randn(4, 6)
        values, ids = logits.log_softmax(-1).topk(6)
        kept = TopK.from_log_probs(ids, values, 6)
        assert (kept.log_tail == -math.inf).all()
        torch.testing.assert_close(kept.expand(), logits.log_softmax(-1))

    def test_parts_come_together(self):
        whole = topk_compress(torch.randn(7, 20), 3)
        again = TopK.cat([whole[:2], whole[2:3], whole[3:]])
        assert torch.equal(again.ids, whole.ids)
        assert torch.equal(again.log_tail, whole.log_tail)
        with pytest.raises(ValueError, match="one K and one V"):
            TopK.cat([whole, topk_compress(torch.randn(7, 20), 4)])
        with pytest.raises(ValueError, match="at least one part, got an empty list"):
            TopK.cat([])
