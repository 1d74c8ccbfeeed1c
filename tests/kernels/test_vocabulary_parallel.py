"""A vocabulary split over processes gives the loss, and each its part of the gradient, of one process."""

import pytest
import torch
import torch.distributed as dist
from kernels import ranks
from kernels.pairs import pairwise

from feddistill_kernels import (
    DistillationLoss,
    TopK,
    distillation_loss,
    kinds,
    softmax_divergence,
    topk_compress,
)
from feddistill_kernels.vocabulary_parallel import _op

pytestmark = pytest.mark.cpu("its processes meet over gloo")

CASES = ranks.cases()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """All are asked everything at once: to start them takes longer than all their answers."""
    return ranks.answers_of(tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_together_are_one_process(name, worlds):
    case = CASES[name]
    loss, gradient = ranks.run(case | ({} if "call" in case else {"backend": "reference"}))
    for answers in worlds.values():
        losses, parts = zip(*(answer[name] for answer in answers), strict=True)
        are_one_process(name, losses, parts, loss, gradient)


def are_one_process(name, losses, parts, loss, gradient):
    tight = {"rtol": 1e-12, "atol": 1e-13} if loss.dtype == torch.float64 else {"rtol": 2e-6, "atol": 4e-6}
    for mine in losses:
        assert torch.equal(mine.nan_to_num(nan=7.25), losses[0].nan_to_num(nan=7.25))
        torch.testing.assert_close(mine, loss, equal_nan=True, **tight)
        if name.endswith("near"):  # divergences of 1e-8, of differences of 2e-4 between numbers of 10
            torch.testing.assert_close(mine, loss, rtol=5e-3, atol=0)
    if gradient is None:
        assert set(parts) == {None}
        return
    got = torch.cat(parts, dim=1)
    if gradient.dtype in (torch.bfloat16, torch.float16):
        tight = {"rtol": 2 * torch.finfo(gradient.dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(got, gradient, equal_nan=True, **tight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows", r"student must have the same rows on every rank, got [4, 3]"),
        ("dtype", "student must be float64 on every rank of group or on none"),
        ("label", f"labels row 2 is {ranks.V}; it must be in [0, {ranks.V}) or ignore_index"),
        ("id", f"teacher row 2 keeps an id outside [0, {ranks.V})"),
        ("id twice", "teacher row 1 keeps id 3 twice; -1 stands for no entry"),
        ("student", "student row 0 is all -inf"),
        ("teacher", "teacher row 0 is all -inf"),
        ("pad", "teacher has 10 columns on rank 0, student has 20: a pad must be at the end"),
        ("teachers", "teacher keeps [0, 2] ids a row on the ranks of group, 0 for logits"),
        ("vocabulary", "is [30, 30] on the ranks of group, student has 29 columns in all"),
        ("vocabularies", "teacher's vocabulary is [29, 28] on the ranks of group"),
        ("wider", "teacher's vocabulary is 20, student has "),
        ("native", "backend 'native' cannot run vocabulary_parallel"),
    ],
)
def test_every_rank_refuses_what_does_not_fit(name, message, worlds):
    for answer in worlds[2]:
        assert message in answer[f"refused: {name}"]


def test_a_group_of_others_is_refused(worlds):
    assert worlds[2][1]["refused: member"] == "group has not this process among its ranks"


def test_the_module_takes_a_group(alone):
    student, teacher = torch.randn(2, 3, 7)
    loss = DistillationLoss(kind="tvd", group=alone)(student, teacher)
    torch.testing.assert_close(loss, distillation_loss(student, teacher, kind="tvd"))


def test_a_gradient_is_multiplied_by_what_comes_from_above_each_time(alone):
    leaf, teacher = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    (plain,) = torch.autograd.grad(0.3 * distillation_loss(leaf, teacher), leaf)
    (mine,) = torch.autograd.grad(0.3 * distillation_loss(leaf, teacher, group=alone), leaf)
    torch.testing.assert_close(mine, plain)
    student = leaf * 1
    loss = 0.3 * distillation_loss(student, teacher, inplace=True, group=alone)
    (mine,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(mine, plain)
    mine.zero_()
    (mine,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(student.detach(), plain)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_waits_for_no_other_rank(reduction, alone, monkeypatch):
    leaf, teacher = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    loss = distillation_loss(leaf, teacher, reduction=reduction, group=alone)
    monkeypatch.setattr(dist, "all_gather", None)
    loss.sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kd_weight", "collectives", "kind", "compressed"),
    [
        (*call, kind, compressed)
        for call, kind, compressed in pairwise([(1.0, 3), (0.5, 3), (0.0, 2)], kinds(), [False, True])
    ],
)
def test_ranks_speak_as_seldom_as_promised_and_of_rows_alone(
    compressed, kind, kd_weight, collectives, alone, monkeypatch
):
    sizes, gather = [], dist.all_gather

    def counted(everyone, mine, group):
        sizes.append(mine.numel())
        gather(everyone, mine, group)

    monkeypatch.setattr(dist, "all_gather", counted)
    student, teacher = torch.randn(2, 5, 4099)
    given = topk_compress(teacher, 50) if compressed else teacher
    distillation_loss(student, given, torch.arange(5), kind=kind, kd_weight=kd_weight, group=alone)
    assert len(sizes) == collectives
    assert sum(sizes) <= 9 * 5 + 5


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "topk"])
def test_off_the_cpu_no_number_is_looked_at(compressed, kind, alone, monkeypatch):
    """A tensor without memory has none to look at."""
    monkeypatch.setattr(_op, "_gathered", lambda mine, group: torch.stack([mine, mine]))
    student = torch.empty(3, 8, device="meta", requires_grad=True)
    teacher = torch.empty(3, 8, device="meta")
    if compressed:
        ids = torch.empty(3, 2, device="meta", dtype=torch.int32)
        teacher = TopK(ids, teacher[:, :2], teacher[:, 0], 12)
    labels = torch.empty(3, device="meta", dtype=torch.int64)
    for reduction in ("mean", "none"):
        loss = distillation_loss(
            student, teacher, labels, kind=kind, kd_weight=0.5, reduction=reduction, group=alone
        )
        loss.sum().backward()
    assert student.grad.is_meta


def test_an_id_of_no_rank_shows_where_nobody_looks(alone, monkeypatch):
    monkeypatch.setattr(_op, "_check_ids", lambda shard: None)
    student = torch.randn(3, 8, requires_grad=True)
    teacher = topk_compress(torch.randn(3, 8), 2)
    teacher.ids[1, 0] = 8
    loss = softmax_divergence(student, teacher, group=alone)
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert student.grad.isnan().all(-1).tolist() == [False, True, False]


def test_under_the_compiler_a_group_is_refused(alone):
    torch._dynamo.reset()
    function = torch.compile(
        lambda s, t: softmax_divergence(s, t, group=alone), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="group is for eager mode"):
        function(*torch.randn(2, 3, 7))


def test_a_group_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"group needs .*init_process_group, which has not"):
        softmax_divergence(*torch.randn(2, 3, 7), group=object())


def test_what_is_no_group_is_refused(alone):
    with pytest.raises(ValueError, match=r"group must be a .*ProcessGroup, got str"):
        softmax_divergence(*torch.randn(2, 3, 7), group="tensor parallel")
