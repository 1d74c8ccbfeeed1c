"""Large results lie in memory that earlier ones gave back; nobody else may see that."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from feddistill_kernels import distillation_loss
from feddistill_kernels._native import compiled, drop_pages, empty_like

MODULE = compiled()
pytestmark = pytest.mark.skipif(
    isinstance(MODULE, str) or not MODULE.keeps_pages, reason="memory is not kept on this system"
)

ROWS, VOCAB = 40, 60_000  # 9.6 MB in float32


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    gc.collect()
    drop_pages()


def gradient(seed: int, vocab: int = VOCAB) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(ROWS, vocab, generator=random).requires_grad_()
    distillation_loss(student, torch.randn(ROWS, vocab, generator=random)).backward()
    assert student.grad is not None
    return student.grad


def test_what_is_given_back_is_used_again() -> None:
    first = empty_like(torch.empty(ROWS, VOCAB))
    place = first.data_ptr()
    del first
    assert empty_like(torch.empty(ROWS, VOCAB)).data_ptr() == place
    drop_pages()  # of what is not kept nothing happens
    assert empty_like(torch.empty(ROWS // 2, VOCAB, dtype=torch.float64)).shape == (ROWS // 2, VOCAB)


def test_results_that_live_share_nothing() -> None:
    alive = [gradient(seed) for seed in range(4)]
    before = [x.clone() for x in alive]
    again = [gradient(seed) for seed in range(4)]
    for x, y, z in zip(alive, before, again, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    assert len({x.data_ptr() for x in (*alive, *again)}) == 8


def test_a_view_keeps_its_memory() -> None:
    row = gradient(0)[3]
    wanted = row.clone()
    for seed in range(1, 4):
        gradient(seed)
    assert torch.equal(row, wanted)


def test_it_is_memory_like_any_other() -> None:
    made = gradient(0)
    assert torch.equal(pickle.loads(pickle.dumps(made)), made)
    assert torch.equal(copy.deepcopy(made), made)
    assert torch.equal(torch.from_numpy(made.numpy()), made)
    assert made.is_contiguous()
    assert not made._is_view()
    made.mul_(2)


def test_another_size_has_memory_of_its_own() -> None:
    for vocab in (VOCAB, 10 * VOCAB, VOCAB, VOCAB + 7, 4 * VOCAB):
        made = gradient(1, vocab)
        assert made.shape == (ROWS, vocab)
        assert torch.allclose(made.sum(-1), torch.zeros(ROWS), atol=1e-5)


def test_threads_do_not_meet() -> None:
    wanted = {seed: gradient(seed) for seed in range(4)}
    with ThreadPoolExecutor(4) as pool:
        for seed, made in zip([0, 1, 2, 3] * 8, pool.map(gradient, [0, 1, 2, 3] * 8), strict=True):
            assert torch.equal(made, wanted[seed])


def test_small_results_and_strided_inputs_go_the_usual_way() -> None:
    assert empty_like(torch.empty(3, 5)).shape == (3, 5)
    strided = torch.empty(ROWS, 2 * VOCAB)[:, ::2]
    assert empty_like(strided).is_contiguous()
    with pytest.raises(MemoryError):
        MODULE.Pages(1 << 60)
