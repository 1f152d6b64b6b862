"""A checkpoint's files of weights: which are read, what is said of broken ones, their sizes and types."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from actors.checkpoint.tensors import INDEX, iterate_tensors, stored_bytes, stored_dtype, weight_files, write_tensors


def test_no_weights(tmp_path):
    """A folder without weights is named."""
    with pytest.raises(ValueError, match=re.escape(f"{str(tmp_path)!r} holds no .safetensors file")):
        next(iterate_tensors(tmp_path))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"weight_map": null}'])
def test_an_index_that_names_no_files(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=rf"{INDEX}' has no weight_map: copy or download it again"):
        weight_files(tmp_path)


def test_shards_and_index(tmp_path):
    """Tensors of 40, 40, 120 and 8 bytes at 80 bytes a shard: three files, and an index that finds each."""
    sizes = {"a": 10, "b": 10, "c": 30, "d": 2}
    tensors = {name: torch.arange(size, dtype=torch.float32) for name, size in sizes.items()}
    write_tensors(tmp_path, iter(tensors.items()), shard_bytes=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = "model-0000{}-of-00003.safetensors".format
    assert index["weight_map"] == {"a": file(1), "b": file(1), "c": file(2), "d": file(3)}
    assert index["metadata"]["total_size"] == 208
    assert sorted(p.name for p in tmp_path.iterdir()) == [file(1), file(2), file(3), "model.safetensors.index.json"]
    for name, place in index["weight_map"].items():
        with safe_open(tmp_path / place, framework="pt") as stream:
            assert torch.equal(stream.get_tensor(name), tensors[name])


def test_stored_bytes(tmp_path):
    """3 float16 and 5 int32 in one file, 7 bytes in another: 6 + 20 + 7 = 33; headers do not count."""
    save_file(
        {"a": torch.zeros(3, dtype=torch.float16), "b": torch.zeros(5, dtype=torch.int32)}, tmp_path / "x.safetensors"
    )
    save_file({"c": torch.zeros(7, dtype=torch.uint8)}, tmp_path / "y.safetensors", metadata={"format": "pt"})
    assert stored_bytes(str(tmp_path)) == 33


def test_stored_bytes_of_a_checkpoint(tiny_path):
    """The sum over all tensors, read one by one."""
    tensors = [tensor for _, tensor in iterate_tensors(Path(tiny_path))]
    assert stored_bytes(tiny_path) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_stored_dtype(tiny_path, tmp_path):
    """What config.json says, under its new name or its old one; float16 where it says nothing."""
    assert stored_dtype(tiny_path) == torch.float32
    config = json.loads((Path(tiny_path) / "config.json").read_text())
    del config["dtype"]
    for extra, expected in (({}, torch.float16), ({"torch_dtype": "bfloat16"}, torch.bfloat16)):
        (tmp_path / "config.json").write_text(json.dumps({**config, **extra}))
        assert stored_dtype(str(tmp_path)) == expected
