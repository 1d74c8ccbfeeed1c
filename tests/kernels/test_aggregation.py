"""Aggregating compressed answers is aggregating the answers."""

import math

import pytest
import torch
from kernels import oracles

from feddistill_kernels import TopK, aggregate_topk, rules, topk_compress

OPERATOR = "aggregation"
INF = math.inf
WEIGHTED = ("mean_probs", "mean_logits")


def answers(count, n, vocab, kept, dtype=torch.float32):
    kept = kept if isinstance(kept, list) else [kept] * count
    return [topk_compress(2 * torch.randn(n, vocab, dtype=dtype), k, id_order=False) for k in kept]


def settings(rule, count):
    return {"trim": (count - 1) // 3} if rule == "trimmed_mean" else {}


@pytest.mark.parametrize(
    ("count", "n", "vocab", "kept"),
    [
        (1, 3, 11, 4),
        (2, 1, 5, 5),
        (3, 7, 40, 6),
        (4, 5, 13, 9),
        (5, 3, 1009, 32),
        (3, 4, 12, [12, 1, 5]),
        (3, 0, 12, 4),
    ],
)
@pytest.mark.parametrize("rule", rules())
def test_sparse_is_dense(rule, count, n, vocab, kept, backend, nan_filled_memory):
    clients = answers(count, n, vocab, kept)
    extra = settings(rule, count)
    got = aggregate_topk(clients, rule, backend=backend, **extra)
    truth = oracles.aggregate(torch.stack([c.expand() for c in clients]), rule, None, extra.get("trim", 0))
    torch.testing.assert_close(got.expand().double(), truth, rtol=1e-5, atol=2e-5)
    assert got.ids.shape == (n, min(sum(c.ids.shape[1] for c in clients), vocab))
    assert (got.ids[:, 1:] > got.ids[:, :-1]).all()


@pytest.mark.parametrize("per_row", [False, True], ids=["C", "CxN"])
@pytest.mark.parametrize("rule", WEIGHTED)
def test_weights_are_the_dense_ones(rule, per_row, backend):
    clients = answers(4, 6, 30, 5)
    weights = torch.rand(4, 6) if per_row else torch.tensor([0.0, 3.0, 1.0, 0.5])
    got = aggregate_topk(clients, rule, weights=weights, backend=backend)
    truth = oracles.aggregate(torch.stack([c.expand() for c in clients]), rule, weights, 0)
    torch.testing.assert_close(got.expand().double(), truth, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rule", rules())
def test_clients_that_agree_get_their_answer_back(rule, backend):
    (client,) = answers(1, 4, 20, 6)
    got = aggregate_topk([client] * 5, rule, backend=backend, **settings(rule, 5))
    torch.testing.assert_close(got.expand(), client.expand(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", rules())
def test_order_of_clients_is_irrelevant(rule, backend):
    clients = answers(5, 4, 20, 6)
    forth, back = (
        aggregate_topk(order, rule, backend=backend, **settings(rule, 5))
        for order in (clients, clients[::-1])
    )
    assert torch.equal(forth.ids, back.ids)
    torch.testing.assert_close(forth.log_probs, back.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", rules())
def test_cutting_to_k_keeps_the_likeliest_and_all_the_mass(rule, backend):
    clients = answers(5, 4, 50, 6)
    extra = settings(rule, 5)
    whole = aggregate_topk(clients, rule, backend=backend, **extra)
    cut = aggregate_topk(clients, rule, k=7, backend=backend, **extra)
    assert cut.ids.shape == (4, 7)
    torch.testing.assert_close(cut.expand().exp().sum(-1), torch.ones(4))
    best = whole.log_probs.topk(7, dim=-1).values.sort(-1).values
    torch.testing.assert_close(cut.log_probs.sort(-1).values, best, rtol=1e-5, atol=1e-5)


def test_a_client_of_weight_0_has_no_veto(backend):
    ids = torch.tensor([[0]], dtype=torch.int32)
    sure = TopK(ids, torch.zeros(1, 1), torch.tensor([-INF]), 3)
    other = TopK(ids + 1, torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(), 3)
    got = aggregate_topk([sure, other], "mean_logits", weights=torch.tensor([0.0, 1.0]), backend=backend)
    torch.testing.assert_close(got.expand(), other.expand())


def test_clients_that_rule_each_other_out_are_refused():
    ids = torch.tensor([[0]], dtype=torch.int32)
    clients = [TopK(ids + i, torch.zeros(1, 1), torch.tensor([-INF]), 3) for i in range(2)]
    with pytest.raises(ValueError, match="the aggregate's row 0 is all -inf"):
        aggregate_topk(clients, "mean_logits")


def test_more_rows_than_one_chunk(backend):
    clients = answers(3, 3000, 1000, 200)
    whole = aggregate_topk(clients, "median", backend=backend)
    part = aggregate_topk([c[2990:] for c in clients], "median", backend=backend)
    assert torch.equal(whole.ids[2990:], part.ids)
    assert torch.equal(whole.log_probs[2990:], part.log_probs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "medain"}, "unknown rule 'medain'; .*did you mean 'median'"),
        ({"clients": []}, "clients must hold at least one TopK"),
        ({"rule": "trimmed_mean"}, "rule 'trimmed_mean' needs trim"),
        ({"rule": "median", "trim": 1}, "rule 'median' has no trim"),
        ({"rule": "trimmed_mean", "trim": 2}, r"trim must be in \[0, 1\] for 3 clients, got 2"),
        (
            {"rule": "median", "weights": torch.ones(3)},
            "rule 'median' has no weights; .*mean_probs, mean_logits",
        ),
        ({"weights": torch.ones(2)}, r"weights must have shape \[3\] or \[3, 4\], got \[2\]"),
        ({"weights": torch.ones(3, dtype=torch.int64)}, "weights must be float32 or float64"),
        ({"k": 0}, r"k must be in \[1, 9\], the vocabulary, got 0"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    arguments = {"clients": answers(3, 4, 9, 2), "rule": "mean_probs", **change}
    with pytest.raises(ValueError, match=message):
        aggregate_topk(**arguments)


def test_clients_that_do_not_fit_are_named():
    clients = answers(2, 4, 9, 2)
    with pytest.raises(
        ValueError, match=r"clients\[1\] has 3 rows over 9 entries but clients\[0\] has 4 over 9"
    ):
        aggregate_topk([clients[0], clients[1][:3]], "median")
