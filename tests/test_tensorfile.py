"""Teachers on disk: the format is that of safetensors, to the byte."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from feddistill.store.logit_files import Chained, TensorFile, TopKFile
from feddistill_kernels import topk_compress


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (100, 1000), (1, 9_999_999)])
def test_the_file_is_what_safetensors_writes(shape, tmp_path):
    values = torch.randn(shape)
    save_file({"log_probs": values}, tmp_path / "other")
    file = TensorFile.create(tmp_path / "own", shape)
    for start in range(0, shape[0], 3):
        file.put(start, values[start : start + 3])
    assert (tmp_path / "own").read_bytes() == (tmp_path / "other").read_bytes()
    assert torch.equal(load_file(tmp_path / "own")["log_probs"], values)


def test_rows_are_read_back_and_are_copies(tmp_path):
    values = torch.randn(10, 4)
    file = TensorFile.create(tmp_path / "own", (10, 4))
    file.put(0, values[:6])
    file.put(6, values[6:])
    assert torch.equal(file(2, 9), values[2:9])
    again = TensorFile.open(tmp_path / "own")
    assert again.shape == (10, 4)
    assert len(again) == 10
    picked = torch.tensor([7, 0, 7])
    assert torch.equal(again[picked], values[picked])
    rows = again(0, 10)
    rows.zero_()
    assert torch.equal(again(0, 10), values)


def test_teachers_one_after_the_other_are_read_as_one(tmp_path):
    dense = [torch.randn(rows, 4) for rows in (3, 5, 1)]
    files, few = [], []
    for number, values in enumerate(dense):
        files.append(TensorFile.create(tmp_path / f"{number}", tuple(values.shape)))
        files[-1].put(0, values)
        kept = topk_compress(values, 2)
        few.append(TopKFile.create(tmp_path / f"{number}k", len(values), 2, 4))
        few[-1].put(0, kept)
    chained, whole = Chained(files), torch.cat(dense)
    assert len(chained) == 9
    wanted = topk_compress(whole, 2)
    for rows in ([8, 0, 3, 2, 7, 0], [4], range(9), []):
        rows = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(chained[rows], whole[rows])
        found = Chained(few)[rows]
        assert torch.equal(found.ids, wanted[rows].ids)
        assert torch.equal(found.log_probs, wanted[rows].log_probs)
        assert torch.equal(found.log_tail, wanted[rows].log_tail)
