"""Teachers on disk: the format is that of safetensors, to the byte."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from feddistill.tensorfile import TensorFile


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
