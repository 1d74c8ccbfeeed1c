"""Aggregating compressed answers is aggregating the answers."""

import contextlib
import math

import pytest
import torch
from kernels import oracles

from feddistill_kernels import (
    BackendError,
    TopK,
    aggregate_topk,
    available_backends,
    rules,
    topk_compress,
)
from feddistill_kernels._native import library
from feddistill_kernels.aggregation import _native, _reference

OPERATOR = "aggregation"
INF = math.inf
WEIGHTED = ("mean_probs", "mean_logits")
BY_ROW = tuple(rule for rule in rules() if rule != "krum")


def answers(count, n, vocab, kept, dtype=torch.float32):
    kept = kept if isinstance(kept, list) else [kept] * count
    return [topk_compress(2 * torch.randn(n, vocab, dtype=dtype), k, id_order=False) for k in kept]


def settings(rule, count):
    """What the rule needs, for as many liars as it can stand."""
    if rule == "krum" and count < 3:
        pytest.skip("krum needs three clients")
    return {
        "trimmed_mean": {"trim": (count - 1) // 3},
        "mean_around_median": {"keep": count - (count - 1) // 2},
        "krum": {"byzantine": (count - 3) // 2, "keep": 1 + count // 4},
    }.get(rule, {})


def dense(clients, rule, **given):
    return oracles.aggregate(torch.stack([c.expand().double() for c in clients]), rule, **given)


# Each rule with one client, with some of several sizes and with many columns; one with many clients or ids.
@pytest.mark.interpreted(
    where=lambda rule, count, kept, **_: rule == "median" or count in (1, 5) or isinstance(kept, list)
)
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
        (7, 2, 100_003, 211),
        (40, 2, 300, 5),
    ],
)
@pytest.mark.parametrize("rule", rules())
def test_sparse_is_dense(rule, count, n, vocab, kept, backend, nan_filled_memory):
    clients = answers(count, n, vocab, kept)
    extra = settings(rule, count)
    got = aggregate_topk(clients, rule, backend=backend, **extra)
    torch.testing.assert_close(got.expand().double(), dense(clients, rule, **extra), rtol=1e-5, atol=2e-5)
    assert got.ids.shape == (n, min(sum(c.ids.shape[1] for c in clients), vocab))
    assert (got.ids[:, 1:] > got.ids[:, :-1]).all()


@pytest.mark.parametrize("per_row", [False, True], ids=["C", "CxN"])
@pytest.mark.parametrize("rule", WEIGHTED)
def test_weights_are_the_dense_ones(rule, per_row, backend):
    clients = answers(4, 6, 30, 5)
    weights = torch.rand(4, 6) if per_row else torch.tensor([0.0, 3.0, 1.0, 0.5])
    got = aggregate_topk(clients, rule, weights=weights, backend=backend)
    truth = dense(clients, rule, weights=weights)
    torch.testing.assert_close(got.expand().double(), truth, rtol=1e-5, atol=2e-5)


@pytest.mark.interpreted(where=lambda vocab, **_: vocab < 5000)
@pytest.mark.parametrize(
    ("count", "vocab", "kept"), [(3, 30, 5), (7, 9, [2, 3, 9, 1, 2, 4, 5]), (5, 5003, 130)]
)
@pytest.mark.parametrize("rule", rules())
def test_mixing_is_the_dense_one(rule, count, vocab, kept, backend, device, nan_filled_memory):
    interpreted = backend == "triton" and device == "cpu"
    clients = answers(count, 1 if interpreted else 6, vocab, kept)
    most = (count - 1) // 2
    for mix in (most,) if interpreted else range(most + 1):
        extra = {**settings(rule, count), "mix": mix}
        got = aggregate_topk(clients, rule, backend=backend, **extra)
        torch.testing.assert_close(got.expand().double(), dense(clients, rule, **extra), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rule", rules())
def test_every_dtype_and_any_layout(rule, backend):
    """Clients of several at once; rows and entries apart in memory."""
    clients = answers(5, 6, 50, [3, 17, 9, 16, 4])
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float16, torch.bfloat16]
    rounded = [c.to(dtype=d) for c, d in zip(clients, dtypes, strict=True)]
    apart = [
        TopK(
            c.ids.repeat(1, 2)[::2, : c.ids.shape[1]], c.log_probs.T.contiguous().T[::2], c.log_tail[::2], 50
        )
        for c in rounded
    ]
    extra = settings(rule, 5)
    got = aggregate_topk(apart, rule, backend=backend, **extra)
    assert got.log_probs.dtype == torch.float32
    torch.testing.assert_close(
        got.expand().double(), dense([c[::2] for c in rounded], rule, **extra), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("rule", rules())
@pytest.mark.parametrize("mix", [None, 1])
def test_ruled_out_ids_are_those_of_the_dense_rule(rule, mix, backend):
    """All clients rule the same ids out, so that all are as near as before."""
    ruled_out = torch.zeros(2, 30).masked_fill_(torch.rand(2, 30) < 0.4, -INF)
    ruled_out[:, 0] = 0
    clients = [topk_compress(torch.randn(2, 30) + ruled_out, 25) for _ in range(5)]
    extra = {**settings(rule, 5), "mix": mix}
    got = aggregate_topk(clients, rule, backend=backend, **extra).expand()
    assert torch.equal(got == -INF, ruled_out == -INF)
    torch.testing.assert_close(got.double(), dense(clients, rule, **extra), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("extra", [{"rule": "krum", "byzantine": 1, "keep": 4}, {"rule": "median", "mix": 1}])
def test_who_rules_other_ids_out_is_infinitely_far_and_left_out(extra, backend):
    clients = answers(5, 2, 30, 29)
    sparse = topk_compress(torch.randn(2, 30).masked_fill_(torch.eye(2, 30) > 0, -INF), 30)
    got = aggregate_topk([sparse, *clients], backend=backend, **extra).expand()
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), dense([sparse, *clients], **extra), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mix", [None, 1])
def test_where_all_are_infinitely_far_the_first_is_chosen_and_nothing_is_nan(mix, backend):
    clients = [topk_compress(torch.randn(2, 9).index_fill_(1, torch.tensor([i]), -INF), 9) for i in range(5)]
    got = aggregate_topk(clients, "krum", byzantine=1, mix=mix, backend=backend)
    assert not got.log_probs.isnan().any()
    if mix is None:
        torch.testing.assert_close(got.expand(), clients[0].expand())


@pytest.mark.parametrize("rule", BY_ROW)
def test_nan_stays_in_its_row(rule, backend):
    clients = answers(5, 3, 20, 4)
    clients[2].log_probs[1, 2] = math.nan
    got = aggregate_topk(clients, rule, k=9, backend=backend, **settings(rule, 5))
    assert got.log_probs.isnan().all(-1).tolist() == [False, True, False]
    assert got.log_tail.isnan().tolist() == [False, True, False]
    assert all(len(set(row)) == 9 and set(row) <= set(range(20)) for row in got.ids.tolist())


@pytest.mark.parametrize(
    "extra", [{"rule": "krum", "byzantine": 1}, {"rule": "krum", "byzantine": 0, "mix": 1}]
)
def test_a_client_with_nan_is_not_chosen(extra, backend):
    clients = answers(5, 3, 20, 4)
    clients[0].log_tail[1] = math.nan
    clients[0].log_probs[2, 2] = math.nan
    assert aggregate_topk(clients, backend=backend, **extra).log_probs.isfinite().all()


def test_krum_chooses_once_for_all_rows(backend):
    """The liar is the honest ones' mean in one row, and far from them in the other."""
    base = torch.randn(2, 30)
    clients = [topk_compress(base + 0.1 * torch.randn(2, 30), 30) for _ in range(4)]
    middle = aggregate_topk(clients, "mean_logits").expand()
    liar = topk_compress(torch.stack([middle[0], -middle[1]]), 30)
    got = aggregate_topk([liar, *clients], "krum", byzantine=1, backend=backend).expand()
    assert any(torch.allclose(got, client.expand(), atol=1e-5) for client in clients)
    alone = aggregate_topk([liar[:1], *(c[:1] for c in clients)], "krum", byzantine=1, backend=backend)
    torch.testing.assert_close(alone.expand(), liar[:1].expand())


def test_distances_do_not_see_a_constant_of_a_row(backend):
    """Log-probabilities are logits up to one."""
    clients = answers(5, 2, 30, 8)
    shifted = []
    for client in clients:
        constant = 5 * torch.randn(2)
        shifted.append(TopK(client.ids, client.log_probs + constant[:, None], client.log_tail + constant, 30))
    for mix in (None, 1):
        one, other = (
            aggregate_topk(c, "krum", byzantine=1, mix=mix, backend=backend) for c in (clients, shifted)
        )
        torch.testing.assert_close(one.expand(), other.expand(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rule", ["median", "geometric_median", "krum", "mean_around_median"])
@pytest.mark.parametrize("mix", [None, 2])
def test_a_minority_of_liars_moves_the_result_little(rule, mix, backend):
    base = 2 * torch.randn(2, 40)
    honest = [topk_compress(base + 0.1 * torch.randn(2, 40), 8) for _ in range(5)]
    liars = [topk_compress(30 * torch.randn(2, 40), 8) for _ in range(2)]
    extra = {**settings(rule, 7), "mix": mix}
    got = aggregate_topk([*liars, *honest], rule, backend=backend, **extra).expand().exp()
    truth = aggregate_topk(honest, "mean_logits").expand().exp()
    moved = aggregate_topk([*liars, *honest], "mean_probs", backend=backend).expand().exp()
    assert (got - truth).abs().sum(-1).max() < 0.35 * (moved - truth).abs().sum(-1).min()


def test_the_geometric_median_of_two_camps_is_the_larger_one(backend):
    one, other = answers(2, 4, 20, 6)
    got = aggregate_topk([one, other, one, other, one], "geometric_median", backend=backend)
    near = (got.expand().exp() - one.expand().exp()).abs().max()
    assert near < 0.02


def test_more_steps_come_nearer_to_the_geometric_median(backend):
    clients = answers(5, 4, 20, 6)
    truth = dense(clients, "geometric_median")
    off = [
        float(
            (
                aggregate_topk(clients, "geometric_median", max_iterations=steps, backend=backend).expand()
                - truth
            )
            .abs()
            .max()
        )
        for steps in (1, 4, 64)
    ]
    assert off[0] > off[1] > off[2]
    loose = aggregate_topk(clients, "geometric_median", tolerance=10.0, backend=backend)
    first = aggregate_topk(clients, "geometric_median", max_iterations=1, backend=backend)
    assert torch.equal(loose.log_probs, first.log_probs)


@pytest.mark.cpu("threads are a CPU's")
@pytest.mark.interpreted(where=lambda **_: False)
@pytest.mark.parametrize("rule", rules())
@pytest.mark.parametrize("mix", [None, 1])
def test_the_number_of_threads_changes_nothing(rule, mix, backend):
    clients = answers(5, 300, 600, 12)  # so many rows that distances take two of them at once
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = aggregate_topk(clients, rule, k=40, mix=mix, backend=backend, **settings(rule, 5))
        results.append((got.ids, got.log_probs, got.log_tail))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cpu("instruction sets are a CPU's")
@pytest.mark.parametrize("rule", rules())
def test_every_instruction_set_agrees(rule, monkeypatch):
    """This machine runs the best it has; others run the rest."""
    clients = answers(5, 9, 700, 130)
    extra = {**settings(rule, 5), "mix": 1, "k": 77, "backend": "native"}
    results = []
    for index, _ in enumerate(library().instruction_sets()):
        monkeypatch.setattr(_native, "library", lambda chosen=index: Chosen(chosen))
        results.append(aggregate_topk(clients, rule, **extra))
    for other in results[1:]:
        torch.testing.assert_close(other.expand(), results[0].expand(), rtol=1e-5, atol=1e-5)


class Chosen:
    """The compiled module with one of its instruction sets."""

    def __init__(self, index):
        self.index = index

    def __getattr__(self, name):
        return lambda *arguments: getattr(library(), name)(*arguments, self.index)


@pytest.mark.parametrize("rule", rules())
def test_chunks_of_the_reference_change_nothing(rule, monkeypatch):
    clients = answers(5, 9, 50, 6)
    extra = {**settings(rule, 5), "mix": 1, "backend": "reference"}
    whole = aggregate_topk(clients, rule, **extra)
    monkeypatch.setattr(_reference, "CHUNK", 400)
    parts = aggregate_topk(clients, rule, **extra)
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.log_probs, parts.log_probs)


def test_equal_entries_are_cut_by_id_fillers_included(backend):
    """Both keep id 7 only; the rest is equal, so that the lowest others join it."""
    ids = torch.tensor([[7]], dtype=torch.int32)
    client = TopK(ids, torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(), 300_000)
    got = aggregate_topk([client] * 4, "median", k=3, backend=backend)
    assert got.ids.tolist() == [[0, 1, 7]]
    whole = aggregate_topk([client] * 9, "median", backend=backend)
    assert whole.ids.tolist() == [list(range(9))]


def test_tails_of_1e_30_survive_a_cut(backend):
    logits = torch.tensor([[0.0, 0.0, -70.0, -200.0, -200.0]])
    got = aggregate_topk([topk_compress(logits, 5)] * 3, "mean_probs", k=3, backend=backend)
    torch.testing.assert_close(got.log_tail, logits[:, 3:].logsumexp(-1) - math.log(2))


@pytest.mark.cpu("it is about what no GPU refuses")
@pytest.mark.parametrize("on", ["native", "triton"])
def test_ids_out_of_range_crash_nothing(on):
    """A wrong result is the caller's; a wrong access would be everybody's."""
    if on not in available_backends(OPERATOR, "cpu"):
        pytest.skip(f"{on} is not here")
    clients = answers(3, 5 if on == "native" else 1, 4, 4)
    for bad in (-1, 4, 2**31 - 1, -(2**31)):
        for client in clients:
            client.ids.random_(-5, 9)
            client.ids[:, 2] = bad
        for rule in rules() if on == "native" else ("geometric_median", "krum"):
            with contextlib.suppress(ValueError):  # a row may have no id left
                aggregate_topk(clients, rule, mix=1, k=3, backend=on, **settings(rule, 3))


@pytest.mark.cpu("it names the C++ of a CPU")
def test_one_client_of_float64_is_one_for_the_reference():
    clients = answers(3, 4, 9, 2)
    clients[1] = clients[1].to(dtype=torch.float64)
    assert aggregate_topk(clients, "median").log_probs.dtype == torch.float64
    with pytest.raises(BackendError, match="float64 is for the reference only"):
        aggregate_topk(clients, "median", backend="native")


@pytest.mark.parametrize("rule", rules())
def test_clients_that_agree_get_their_answer_back(rule, backend):
    (client,) = answers(1, 2, 20, 6)
    got = aggregate_topk([client] * 5, rule, backend=backend, **settings(rule, 5))
    torch.testing.assert_close(got.expand(), client.expand(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", rules())
def test_order_of_clients_is_irrelevant(rule, backend):
    clients = answers(5, 2, 20, 6)
    forth, back = (
        aggregate_topk(order, rule, backend=backend, **settings(rule, 5))
        for order in (clients, clients[::-1])
    )
    assert torch.equal(forth.ids, back.ids)
    torch.testing.assert_close(forth.log_probs, back.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", rules())
def test_cutting_to_k_keeps_the_likeliest_and_all_the_mass(rule, backend):
    clients = answers(5, 2, 50, 6)
    extra = settings(rule, 5)
    whole = aggregate_topk(clients, rule, backend=backend, **extra)
    cut = aggregate_topk(clients, rule, k=7, backend=backend, **extra)
    assert cut.ids.shape == (2, 7)
    torch.testing.assert_close(cut.expand().exp().sum(-1), torch.ones(2))
    best = whole.log_probs.topk(7, dim=-1).values.sort(-1).values
    torch.testing.assert_close(cut.log_probs.sort(-1).values, best, rtol=1e-5, atol=1e-5)


def test_a_client_of_weight_0_has_no_veto(backend):
    ids = torch.tensor([[0]], dtype=torch.int32)
    sure = TopK(ids, torch.zeros(1, 1), torch.tensor([-INF]), 3)
    other = TopK(ids + 1, torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(), 3)
    got = aggregate_topk([sure, other], "mean_logits", weights=torch.tensor([0.0, 1.0]), backend=backend)
    torch.testing.assert_close(got.expand(), other.expand())


@pytest.mark.cpu("to look at rows would be a host sync: such a row gives NaN")
@pytest.mark.interpreted(where=lambda **_: False)  # Triton gives NaN there too
@pytest.mark.parametrize("extra", [{}, {"mix": 0}])
def test_clients_that_rule_each_other_out_are_refused(extra, backend):
    ids = torch.zeros(100, 1, dtype=torch.int32)
    clients = [TopK(ids.clone(), torch.zeros(100, 1), torch.full((100,), -INF), 3) for i in range(2)]
    for row in (40, 90):
        clients[1].ids[row] = 1
    with pytest.raises(ValueError, match="the aggregate's row 40 is all -inf"):
        aggregate_topk(clients, "mean_logits", backend=backend, **extra)


@pytest.mark.parametrize("mix", [None, 0])
def test_clients_that_rule_each_other_out_are_nan_on_triton(mix):
    if "triton" not in available_backends(OPERATOR, torch.get_default_device()):
        pytest.skip("Triton is not here")
    ids = torch.zeros(3, 1, dtype=torch.int32)
    clients = [TopK(ids.clone(), torch.zeros(3, 1), torch.full((3,), -INF), 3) for _ in range(2)]
    clients[1].ids[1] = 1
    got = aggregate_topk(clients, "mean_logits", mix=mix, backend="triton")
    assert got.log_probs.isnan().all(-1).tolist() == [False, True, False]
    assert got.log_tail.isnan().tolist() == [False, True, False]
    assert got.ids[1].tolist() == [0, 1]


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_chunks_of_triton_change_nothing(rule, monkeypatch):
    if "triton" not in available_backends(OPERATOR, torch.get_default_device()):
        pytest.skip("Triton is not here")
    from feddistill_kernels.aggregation import _triton

    clients = answers(5, 3, 30, 4)
    extra = {**settings(rule, 5), "mix": 1, "k": 7, "backend": "triton"}
    whole = aggregate_topk(clients, rule, **extra)
    monkeypatch.setattr(_triton, "TABLE", 1000)  # two rows
    parts = aggregate_topk(clients, rule, **extra)
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.log_probs, parts.log_probs)


@pytest.mark.parametrize(
    ("count", "kept", "message"),
    [(65, 1, "it takes at most 64 clients, got 65"), (3, 1400, "at most 4096 entries .*, got 4200")],
)
def test_more_than_triton_takes_is_refused_by_name_and_left_to_others(count, kept, message):
    if "triton" not in available_backends(OPERATOR, torch.get_default_device()):
        pytest.skip("Triton is not here")
    clients = answers(count, 1, 2000, kept)
    with pytest.raises(BackendError, match=message):
        aggregate_topk(clients, "median", backend="triton")
    assert len(aggregate_topk(clients, "median")) == 1


@pytest.mark.interpreted(where=lambda **_: False)
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
        ({"rule": "mean_around_median"}, "rule 'mean_around_median' needs keep"),
        ({"rule": "krum"}, "rule 'krum' needs byzantine"),
        ({"keep": 1}, "rule 'mean_probs' has no keep; those that have: mean_around_median, krum"),
        ({"rule": "median", "tolerance": 0.1}, "rule 'median' has no tolerance; .*: geometric_median"),
        (
            {"rule": "mean_around_median", "keep": 4},
            r"keep must be in \[1, 3\], the number of clients, got 4",
        ),
        ({"rule": "krum", "byzantine": 1}, "krum needs 2 byzantine \\+ 3 clients: got 1 of 3"),
        ({"rule": "krum", "byzantine": -1}, "byzantine must be >= 0.*got -1"),
        ({"rule": "krum", "byzantine": 0, "keep": 0}, r"keep must be in \[1, 3\], the clients less"),
        ({"rule": "geometric_median", "max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"rule": "geometric_median", "tolerance": -1.0}, "tolerance must be >= 0 and finite, got -1.0"),
        ({"mix": 2}, r"mix must be in \[0, 1\] for 3 clients, got 2"),
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
