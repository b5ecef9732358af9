"""The streaming writer: what it writes is what the safetensors library writes, from one process or several."""

import json
import multiprocessing
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.random_llama import CONFIG, llama_tensors
from megashear.errors import ModelError, StorageError
from megashear.hf import safetensors_writer as writer_module
from megashear.hf.safetensors_writer import ShardedWriter

LIMIT = 3000


def sizes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_all(folder, tensors, names, dtype=torch.float32, limit=LIMIT):
    folder.mkdir()
    with ShardedWriter.create(folder, sizes(tensors), dtype, limit) as writer:
        for name in names:
            writer.write(name, tensors[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_single_file_is_the_librarys_byte_for_byte(tmp_path, dtype):
    tensors = llama_tensors(CONFIG, dtype)
    write_all(tmp_path / "ours", tensors, sorted(tensors, reverse=True), dtype, limit=10**9)
    ShardedWriter.finish(tmp_path / "ours")
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert os.listdir(tmp_path / "ours") == ["model.safetensors"]
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_mixed_dtypes_are_the_librarys_byte_for_byte(tmp_path):
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    tensors = {name: t.to(kinds[i % 4]) for i, (name, t) in enumerate(llama_tensors(CONFIG).items())}
    write_all(tmp_path / "ours", tensors, tensors, {name: t.dtype for name, t in tensors.items()}, limit=10**9)
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_shards_are_those_of_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(LlamaConfig(**{key: CONFIG[key] for key in CONFIG if key != "architectures"}))
    network.save_pretrained(tmp_path / "theirs", max_shard_size=LIMIT)
    write_all(tmp_path / "ours", network.state_dict(), reversed(network.state_dict()))
    ShardedWriter.finish(tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / side / index).read_text()) for side in ("ours", "theirs"))
    assert ours == theirs


def write_share(folder, start, barrier):
    tensors = llama_tensors(CONFIG)
    if start == 0:
        writer = ShardedWriter.create(folder, sizes(tensors), torch.float32, LIMIT)
    barrier.wait()
    if start:
        writer = ShardedWriter.open(folder)
    for name in list(tensors)[start::3]:
        writer.write(name, tensors[name])
    writer.close()


@pytest.mark.medium
def test_processes_write_into_the_same_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    ranks = [context.Process(target=write_share, args=(tmp_path, start, barrier)) for start in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    ShardedWriter.finish(tmp_path)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= load_file(file)
    expected = llama_tensors(CONFIG)
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.glob(".written*"))


def test_finish_names_what_is_missing_or_double(tmp_path):
    tensors = llama_tensors(CONFIG)
    names = list(tensors)
    write_all(tmp_path / "ours", tensors, [*names[2:], names[5]])
    with pytest.raises(ModelError) as refused:
        ShardedWriter.finish(tmp_path / "ours")
    message = str(refused.value)
    assert f"{names[0]}: never written" in message and f"{names[1]}: never written" in message
    assert f"{names[5]}: written 2 times" in message and len(message.splitlines()) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e6])
def test_values_that_do_not_fit_are_refused_by_name(tmp_path, bad):
    with ShardedWriter.create(tmp_path, {"a": (3, 5)}, torch.float16) as writer:
        tensor = torch.zeros(3, 5)
        tensor[1, 2] = bad
        with pytest.raises(ModelError, match=r"tensor a holds NaN or infinity in torch\.float16"):
            writer.write("a", tensor)
    with pytest.raises(ModelError, match="a: never written"):
        ShardedWriter.finish(tmp_path)


def test_another_shape_is_refused(tmp_path):
    with (
        ShardedWriter.create(tmp_path, {"a": (3, 5)}, torch.float32) as writer,
        pytest.raises(ModelError, match=r"tensor a is \(5, 3\), laid out as \(3, 5\)"),
    ):
        writer.write("a", torch.zeros(5, 3))


def test_pieces_and_strides_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_PIECE", 64)
    tensors = {"a": torch.randn(7, 9).T, "b": torch.randn(50)[::2], "c": torch.randn(300, 40)[:, 3:30]}
    write_all(tmp_path / "ours", tensors, tensors, torch.bfloat16)
    found = {}
    for file in (tmp_path / "ours").glob("*.safetensors"):
        found |= load_file(file)
    assert all(torch.equal(found[name], tensors[name].bfloat16()) for name in tensors)


def test_a_full_disk_is_said_before_the_first_tensor(tmp_path):
    with pytest.raises(StorageError, match=r"model\.safetensors: could not be written"):
        ShardedWriter.create(tmp_path, {"a": (1 << 30, 1 << 20)}, torch.float32, 1 << 62)
