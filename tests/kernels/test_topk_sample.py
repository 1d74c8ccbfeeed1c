"""What drawn entries teach is right on average."""

import math

import pytest
import torch

from feddistill_kernels import aggregate_topk, distillation_loss, softmax_divergence, topk_sample
from feddistill_kernels.topk import _sample

INF = math.inf
MANY = 40_000


def seeded(seed=0):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def teacher(vocab=12):
    """One row with likely, rare and impossible ids."""
    logits = 2 * torch.randn(1, vocab)
    logits[0, 3] = -INF
    return logits


def assert_mean(values, truth):
    """Of ``[MANY, ...]``, within five of its standard errors."""
    owed = 5 * values.double().std(0) / math.sqrt(len(values)) + 1e-6
    assert ((values.double().mean(0) - truth).abs() <= owed).all()


@pytest.mark.parametrize("proposal_temperature", [0.8, 1.0, 2.0])
@pytest.mark.parametrize("draws", [1, 5, 30])
def test_the_estimate_is_unbiased_and_its_variance_is_the_stated_one(draws, proposal_temperature):
    logits = teacher()
    drawn = topk_sample(
        logits.expand(MANY, -1), draws, generator=seeded(), proposal_temperature=proposal_temperature
    )
    q = drawn.expand(tail="none").exp()
    p = logits.double().softmax(-1)[0]
    r = (logits.double() / proposal_temperature).softmax(-1)[0]
    assert_mean(q, p)
    variance = torch.where(p > 0, p * (p / r - p) / draws, 0.0)
    assert_mean((q - p) ** 2, variance)


@pytest.mark.parametrize("proposal_temperature", [0.8, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_forward_kl_is_the_dense_one_on_average(temperature, proposal_temperature):
    logits, student = teacher(), torch.randn(1, 12)
    many = student.repeat(MANY, 1).requires_grad_()
    drawn = topk_sample(
        logits.expand(MANY, -1),
        4,
        generator=seeded(),
        temperature=temperature,
        proposal_temperature=proposal_temperature,
    )
    softmax_divergence(many, drawn, temperature=temperature).sum().backward()
    one = student.clone().requires_grad_()
    softmax_divergence(one, logits, temperature=temperature).backward()
    assert_mean(many.grad, one.grad[0].double())


def test_more_draws_come_nearer():
    logits = torch.randn(64, 500)
    off = []
    for draws in (4, 64, 1024):
        q = topk_sample(logits, draws, generator=seeded()).expand(tail="none").exp()
        off.append(float((q - logits.softmax(-1)).square().sum(-1).mean()))
    assert off[0] > 8 * off[1] > 64 * off[2]


def test_a_weight_is_the_share_of_the_draws():
    drawn = topk_sample(torch.randn(50, 9), 7, generator=seeded())
    counts = 7 * drawn.log_probs.exp()
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(counts.sum(-1), torch.full((50,), 7.0))


@pytest.mark.parametrize("draws", [1, 3, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_ids_are_distinct_and_fillers_weigh_nothing(dtype, draws, nan_filled_memory):
    logits = (4 * torch.randn(30, 9)).to(dtype)
    logits[:, 8] = -INF
    drawn = topk_sample(logits, draws, generator=seeded(), proposal_temperature=1.5)
    assert drawn.ids.shape == (30, min(draws, 9))
    assert drawn.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (drawn.ids[:, 1:] > drawn.ids[:, :-1]).all()
    assert (drawn.log_tail == -INF).all()
    assert (drawn.expand()[:, 8] == -INF).all()
    assert not drawn.log_probs.isnan().any()


def test_a_fully_ruled_out_end_of_the_row_is_never_drawn():
    """Where the cumulative sum is flat, and at its end."""
    logits = torch.full((2000, 50), -INF)
    logits[:, 20] = 0
    drawn = topk_sample(logits, 3, generator=seeded())
    assert (drawn.expand()[:, 20] == 0).all()
    assert (drawn.log_probs > -INF).sum() == 2000


def test_it_is_a_teacher_and_a_client():
    logits = torch.randn(6, 40)
    drawn = topk_sample(logits, 20, generator=seeded())
    student = torch.randn(6, 40, requires_grad=True)
    for kind in ("forward_kl", "jsd", "tvd", "skew_forward_kl"):
        loss = distillation_loss(student, drawn, kind=kind, reduction="none")
        (slope,) = torch.autograd.grad(loss.sum(), student)
        assert (loss >= 0).all()
        assert loss.isfinite().all()
        assert slope.isfinite().all()
    mixed = aggregate_topk([drawn, drawn[torch.arange(5, -1, -1)]], "mean_probs")
    torch.testing.assert_close(mixed.expand().exp().sum(-1), torch.ones(6))


def test_the_generator_decides_and_nothing_else(monkeypatch):
    logits = torch.randn(20, 33)
    torch.manual_seed(1)
    first = topk_sample(logits, 5, generator=seeded(3))
    torch.manual_seed(2)
    monkeypatch.setattr(_sample, "CHUNK", 100)
    again = topk_sample(logits, 5, generator=seeded(3))
    other = topk_sample(logits, 5, generator=seeded(4))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.log_probs, again.log_probs)
    assert not torch.equal(first.ids, other.ids)


def test_nan_stays_in_its_row():
    logits = torch.randn(3, 9)
    logits[1, 4] = math.nan
    drawn = topk_sample(logits, 4, generator=seeded())
    assert drawn.log_probs.isnan().any(-1).tolist() == [False, True, False]
    assert all(len(set(row)) == 4 and set(row) <= set(range(9)) for row in drawn.ids.tolist())


def test_strided_rows_and_no_rows():
    whole = torch.randn(8, 30)
    strided = topk_sample(whole[::2, ::3], 4, generator=seeded())
    assert torch.equal(strided.ids, topk_sample(whole[::2, ::3].contiguous(), 4, generator=seeded()).ids)
    assert len(topk_sample(whole[:0], 4, generator=seeded())) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"proposal_temperature": -1.0}, "proposal_temperature must be positive and finite, got -1.0"),
        ({"logits": torch.zeros(5)}, r"logits must have shape \[N, V\], got \[5\]"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, "logits must be floating point"),
        ({"logits": torch.zeros(2, 5, device="meta")}, "generator is on (cpu|cuda:0), logits are on meta"),
        pytest.param(
            {"logits": torch.full((2, 5), -INF)},
            "logits row 0 is all -inf",
            marks=pytest.mark.cpu("to look at rows would be a host sync: such a row gives NaN"),
        ),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        topk_sample(**{"logits": torch.zeros(3, 5), "draws": 2, "generator": seeded(), **change})
