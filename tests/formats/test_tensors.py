"""Tensors come out of files as they went in, and a damaged file is named."""

import pytest
import torch
from safetensors.torch import save_file

from minigpt2.errors import InputError, NotFoundError
from minigpt2.formats.tensors import FLOATS, read_tensors, write_tensors


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
def test_every_number_is_read_as_safetensors_reads_it(tmp_path, dtype):
    values = {
        "a": torch.randn(3, 5).to(dtype),
        "none": torch.zeros(0, 7, dtype=dtype),
        "one": torch.tensor(2.5, dtype=dtype),
    }
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt", "data_offsets": "7"})
    found, text = read_tensors(tmp_path / "x.safetensors")
    assert text["data_offsets"] == "7" and found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value), name


def test_written_tensors_and_their_text_come_back_from_any_layout(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": whole, "turned": whole.T, "number": torch.tensor(5.0)}
    write_tensors(tmp_path / "some.safetensors", tensors, {"base": "the sea"})
    back, text = read_tensors(tmp_path / "some.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    assert text["base"] == "the sea"


def test_a_missing_or_damaged_tensor_file_is_named(tmp_path):
    path = tmp_path / "some.safetensors"
    with pytest.raises(NotFoundError, match=r"some\.safetensors does not exist"):
        read_tensors(path)
    for damage in (b"", b"<html>", b"\x10\0\0\0\0\0\0\0{}"):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"some\.safetensors is damaged"):
            read_tensors(path)
