"""Rows of a ``TopK`` that keep different numbers of ids: -1 stands for no entry, and no id stands twice."""

import math

import pytest
import torch
from kernels import oracles

from feddistill_kernels import (
    TopK,
    aggregate_topk,
    available_backends,
    distillation_loss,
    kinds,
    linear_distillation_loss,
    rules,
    softmax_divergence,
    topk_compress,
)

N, V, K = 5, 13, 4
LENGTHS = torch.tensor([4, 0, 1, 3, 2])
LABELS = torch.tensor([3, 0, 12, -100, 7])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native", "triton"])
CHECKING = pytest.mark.parametrize("backend", ["reference", "native"])


@pytest.fixture(autouse=True)
def is_here(request, device):
    if "backend" in request.fixturenames:
        operator = "aggregation" if "rule" in request.fixturenames else "distillation"
        if request.getfixturevalue("backend") not in available_backends(operator, device):
            pytest.skip(f"this backend of {operator} is not available on {device}")


def unequal(seed=0, dtype=torch.float32):
    """Rows of ``LENGTHS`` entries in any order, with nonsense beside -1, and the rows one by one without."""
    torch.manual_seed(seed)
    whole = topk_compress(2 * torch.randn(N, V, dtype=dtype), K, temperature=2.0, id_order=False)
    kept = torch.arange(K).expand(N, K).argsort(-1) < LENGTHS[:, None]
    kept = kept.gather(-1, torch.rand(N, K).argsort(-1))
    dropped = torch.where(kept, -math.inf, whole.log_probs)
    tail = torch.cat([dropped, whole.log_tail[:, None]], -1).logsumexp(-1)
    ids = torch.where(kept, whole.ids, -1)
    padded = TopK(ids, torch.where(kept, whole.log_probs, math.nan), tail, V)
    rows = [(whole.ids[n : n + 1, kept[n]], whole.log_probs[n : n + 1, kept[n]], tail[n]) for n in range(N)]
    return padded, rows


def divergences(logits, rows, kind):
    return torch.cat(
        [
            oracles.truncated(logits[n : n + 1], ids, log_probs, tail[None], V, kind, 0.3, 2.0)
            for n, (ids, log_probs, tail) in enumerate(rows)
        ]
    )


@BACKENDS
@pytest.mark.parametrize("kind", kinds())
def test_a_loss_is_over_the_ids_that_a_row_keeps(kind, backend, nan_filled_memory):
    teacher, rows = unequal()
    student = torch.randn(N, V, requires_grad=True)
    leaf = student.detach().double().requires_grad_()
    settings = {"kind": kind, "beta": 0.3, "temperature": 2.0, "kd_weight": 0.6}
    loss = distillation_loss(student, teacher, LABELS, **settings, backend=backend)
    weight = (LABELS >= 0).double()
    truth = oracles.distillation(leaf, divergences(leaf, rows, kind), LABELS, weight, 0.6, 2.0, "mean")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0].double(),
        torch.autograd.grad(truth, leaf)[0],
        rtol=1e-4,
        atol=1e-6,
    )


@BACKENDS
def test_so_it_is_without_logits_and_for_a_row_that_a_gpu_shares_out(backend):
    teacher, rows = unequal()
    hidden, weight = torch.randn(N, 3), torch.randn(V, 3)
    loss = linear_distillation_loss(
        hidden, weight, teacher, temperature=2.0, reduction="sum", backend=backend
    )
    truth = 4 * divergences(hidden.double() @ weight.double().T, rows, "forward_kl").sum()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    wide = torch.randn(1, 9000, requires_grad=True)
    ids = torch.tensor([[8000, -1, 5]], dtype=torch.int32)
    log_probs = torch.tensor([[0.5, math.nan, 0.25]]).log()
    both = [
        TopK(ids[:, part], log_probs[:, part], torch.tensor([0.25]).log(), 9000)
        for part in (slice(3), [0, 2])
    ]
    got, true = (softmax_divergence(wide, of, backend=backend) for of in both)
    torch.testing.assert_close(got, true, rtol=1e-6, atol=0)
    gradients = (torch.autograd.grad(of.sum(), wide)[0] for of in (got, true))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_expanded_rows_share_the_tail_among_what_they_do_not_keep():
    teacher, rows = unequal()
    for n, (ids, log_probs, tail) in enumerate(rows):
        whole = torch.full((V,), float(tail) - math.log(V - len(ids[0])))
        whole[ids[0].long()] = log_probs[0]
        torch.testing.assert_close(teacher.expand()[n], whole)
        assert torch.equal(teacher.expand("none")[n].exp().nonzero()[:, 0], ids[0].sort().values)
    assert torch.equal(teacher.others(), V - LENGTHS)
    assert torch.equal(TopK.cat([teacher[:2], teacher.to()[2:]]).expand(), teacher.expand())
    full = TopK(torch.tensor([[0, 1], [1, -1]], dtype=torch.int32), torch.zeros(2, 2), torch.zeros(2), 2)
    assert full.missing_log_prob().tolist() == [-math.inf, 0.0]


def test_stored_rows_have_what_they_lack_as_tail():
    ids = torch.tensor([[4, 2, -1], [0, -1, -1], [-1, -1, -1], [0, 1, 2]])
    stored = torch.tensor([[0.5, 0.25, 1.0], [0.75, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.25, 0.125]]).log()
    kept = TopK.from_log_probs(ids, stored, vocab_size=5)
    torch.testing.assert_close(kept.log_tail.exp(), torch.tensor([0.25, 0.25, 1.0, 0.125]))
    assert (kept.log_probs[ids < 0] == -math.inf).all()
    pair = TopK.from_log_probs(torch.tensor([[1, 0], [1, -1]]), torch.full((2, 2), 0.5).log(), vocab_size=2)
    assert pair.log_tail.exp().tolist() == [0.0, 0.5]
    torch.testing.assert_close(kept.expand().exp().sum(-1), torch.ones(4))


@BACKENDS
@pytest.mark.parametrize("rule", rules())
@pytest.mark.parametrize("mix", [None, 1])
def test_an_aggregate_is_of_the_ids_that_clients_keep(mix, rule, backend, nan_filled_memory):
    settings = {"trimmed_mean": {"trim": 1}, "mean_around_median": {"keep": 3}, "krum": {"byzantine": 1}}
    settings = settings.get(rule, {}) | {"mix": mix}
    clients = [unequal(seed)[0] for seed in range(4)] + [topk_compress(torch.randn(N, V), 2)]
    clients[0].ids[3] = -1
    clients[0].log_tail[3] = 0
    got = aggregate_topk(clients, rule, **settings, backend=backend)
    truth = oracles.aggregate(torch.stack([c.expand().double() for c in clients]), rule, **settings)
    torch.testing.assert_close(got.expand().double(), truth, rtol=1e-4, atol=1e-4)
    assert (got.ids[:, 1:] > got.ids[:, :-1]).all()
    assert got.ids.min() >= 0


@BACKENDS
def test_clients_that_keep_nothing_agree_on_nothing(backend):
    nothing = TopK(torch.full((2, 3), -1, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(2), V)
    got = aggregate_topk([nothing, nothing], "mean_probs", backend=backend)
    torch.testing.assert_close(got.expand().exp(), torch.full((2, V), 1 / V))


WRONG = {"twice": ([3, 5, 3], "keeps id 3 twice; -1 stands for no entry")} | {
    str(id): ([3, id, -1], rf"keeps an id outside \[0, 13\): {id}") for id in (-2, V)
}


@pytest.mark.cpu("to look at ids would be a host sync")
@CHECKING
@pytest.mark.parametrize("wrong", WRONG)
def test_an_id_twice_or_outside_the_vocabulary_is_refused(wrong, backend):
    ids, message = WRONG[wrong]
    good = topk_compress(torch.randn(3, V), 3)
    bad = TopK(good.ids.clone(), good.log_probs, good.log_tail, V)
    bad.ids[1] = torch.tensor(ids)
    student = torch.randn(3, V)
    with pytest.raises(ValueError, match=f"teacher row 1 {message}"):
        softmax_divergence(student, bad, backend=backend)
    with pytest.raises(ValueError, match=f"teacher row 1 {message}"):
        linear_distillation_loss(torch.randn(3, 2), torch.randn(V, 2), bad, backend=backend)
    assert distillation_loss(
        student, bad, row_weight=torch.tensor([1.0, 0.0, 1.0]), backend=backend
    ).isfinite()
    with pytest.raises(ValueError, match=f"TopK row 1 {message}"):
        bad.expand()
    for rule in ("median", "krum"):
        settings = {"byzantine": 1} if rule == "krum" else {}
        with pytest.raises(ValueError, match=rf"clients\[2\] row 1 {message}"):
            aggregate_topk([good, good, bad, good, good], rule, **settings, backend=backend)
