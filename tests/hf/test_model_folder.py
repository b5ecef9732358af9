"""Reading model folders: every slice is the library's, every fault is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megashear.errors import ModelError
from megashear.files.file_digests import write_manifest
from megashear.hf.model_folder import ModelFolder

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reads_what_the_library_reads(make_folder, shards, dtype):
    folder = make_folder(shards=shards, dtype=dtype)
    model = ModelFolder.open(folder)
    expected = {}
    for file in folder.glob("*.safetensors"):
        expected |= load_file(file)
    assert set(model.tensors) == set(expected) and model.dtype == dtype
    for name, tensor in expected.items():
        assert torch.equal(model.read(name), tensor) and model.read(name).dtype == dtype
        for dim in range(tensor.dim()):
            for start, stop in ((0, 1), (3, 8), (0, tensor.shape[dim]), (2, 2)):
                assert torch.equal(model.read_slice(name, dim, start, stop), tensor.narrow(dim, start, stop - start))


def test_digest_is_of_the_model_not_of_its_files(make_folder):
    one, many = make_folder("one"), make_folder("many", shards=4)
    digest = ModelFolder.open(one).digest()
    assert ModelFolder.open(many).digest() == digest
    assert ModelFolder.open(make_folder("half", dtype=torch.float16)).digest() != digest
    assert ModelFolder.open(make_folder("theta", rope_theta=5e5)).digest() != digest

    def one_value(tensors):
        tensors[Q][3, 2] += 1e-3

    assert ModelFolder.open(make_folder("changed", change=one_value)).digest() != digest


@pytest.mark.parametrize("bounds", [(0, -1, 3), (0, 3, 2), (0, 0, 17), (1, 0, 17), (2, 0, 1)])
def test_range_outside_the_tensor(make_folder, bounds):
    with pytest.raises(IndexError, match="no elements"):
        ModelFolder.open(make_folder()).read_slice(Q, *bounds)


def test_mixed_dtypes_are_kept(make_folder):
    def norms_wide(tensors):
        tensors.update({name: t.float() for name, t in tensors.items() if "norm" in name})

    model = ModelFolder.open(make_folder(dtype=torch.bfloat16, change=norms_wide))
    assert model.dtype == torch.bfloat16 and model.dtypes["model.norm.weight"] == torch.float32


def test_missing_extra_and_misshaped_are_all_named(make_folder):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
        tensors[Q] = torch.zeros(16, 15)

    with pytest.raises(ModelError) as refused:
        ModelFolder.open(make_folder(change=change))
    message = str(refused.value)
    assert "missing tensor model.norm.weight (16,)" in message
    assert "missing tensor model.layers.0.mlp.up_proj.weight (24, 16)" in message
    assert "extra tensor model.layers.0.self_attn.q_proj.bias (16,)" in message
    assert f"tensor {Q} is (16, 15), config.json asks for (16, 16)" in message


def test_rotary_buffers_are_dropped(make_folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    assert not any("inv_freq" in name for name in ModelFolder.open(make_folder(change=change)).tensors)


def test_output_layer_of_a_tied_model(make_folder):
    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors):
        same(tensors)
        tensors["lm_head.weight"][-1, -1] += 1

    tied = make_folder("tied", tie_word_embeddings=True)
    twice = make_folder("twice", change=same, tie_word_embeddings=True, vocab_size=40)
    assert ModelFolder.open(twice).digest() == ModelFolder.open(tied).digest()
    with pytest.raises(ModelError, match=r"extra tensor lm_head\.weight.*values differ"):
        ModelFolder.open(make_folder("other", change=other, tie_word_embeddings=True))


def test_quantised_weights_are_refused(make_folder):
    def change(tensors):
        tensors[Q] = tensors[Q].to(torch.int8)

    with pytest.raises(ModelError, match=r"q_proj\.weight is I8"):
        ModelFolder.open(make_folder(change=change))


def test_pickles_are_never_opened(make_folder, tmp_path):
    folder = make_folder()
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    torch.save({"a": _Touch(str(canary))}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*save_pretrained"):
        ModelFolder.open(folder)
    assert not canary.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert canary.exists(), "the canary sings when the pickle is opened"


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_weights_no_config_no_folder(make_folder, tmp_path):
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        ModelFolder.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        ModelFolder.open(folder)
    with pytest.raises(ModelError, match="no such folder"):
        ModelFolder.open(tmp_path / "absent")


def test_every_truncation_is_refused(make_folder):
    file = make_folder() / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
            ModelFolder.open(file.parent)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        ModelFolder.open(file.parent)


@pytest.mark.parametrize("lie", ["shape", "offsets", "dtype", "length"])
def test_headers_that_lie(make_folder, lie):
    file = make_folder() / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    entry = header[Q]
    if lie == "shape":
        entry["shape"] = [16, 1 << 40]
    elif lie == "offsets":
        entry["data_offsets"] = [0, entry["data_offsets"][1]]
    elif lie == "dtype":
        entry["dtype"] = "F64"
    text = json.dumps(header).encode()
    length = 1 << 62 if lie == "length" else len(text)
    file.write_bytes(length.to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        ModelFolder.open(file.parent)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "a\0.safetensors", "a.bin", 5],
)
def test_index_that_leaves_the_folder(make_folder, name):
    folder = make_folder(shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"index places tensor {Q} in .*, which is not a safetensors file"):
        ModelFolder.open(folder)


def test_index_that_does_not_fit(make_folder):
    folder = make_folder(shards=2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    files = sorted(set(good["weight_map"].values()))
    wrong = {**good["weight_map"], Q: files[1 - files.index(good["weight_map"][Q])]}
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(ModelError, match=f"{Q} is not in"):
        ModelFolder.open(folder)
    for damaged in ("", "[]", "{}", '{"weight_map": [1]}', "[" * 100000):
        index.write_text(damaged)
        with pytest.raises(ModelError, match=r"index\.json: damaged"):
            ModelFolder.open(folder)
    index.write_text(json.dumps(good))
    shutil.copy(folder / files[0], folder / files[1])
    with pytest.raises(ModelError, match=r"stands in .* too"):
        ModelFolder.open(folder)
    (folder / files[1]).unlink()
    with pytest.raises(ModelError, match=f"{files[1]}: missing"):
        ModelFolder.open(folder)


def test_manifest_is_held_against_the_files(make_folder):
    folder = make_folder()
    with pytest.raises(ModelError, match=r"manifest\.json: not found"):
        ModelFolder.open(folder, digests=True)
    write_manifest(folder, {"provenance": {"source": {"path": "here"}}})
    assert ModelFolder.open(folder, digests=True).provenance == {"source": {"path": "here"}}
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: its SHA-256"):
        ModelFolder.open(folder, digests=True)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"model\.safetensors: .* bytes, the manifest says"):
        ModelFolder.open(folder)


def test_mutated_files_never_crash(make_folder):
    """Seeded damage to headers, index and config ends in a ModelError or in a folder that still opens, nothing else."""
    folder = make_folder(shards=2)
    generator = torch.Generator().manual_seed(3)
    targets = [folder / "config.json", folder / "model.safetensors.index.json", *sorted(folder.glob("*.safetensors"))]
    refused = 0
    for trial in range(300):
        file = targets[trial % len(targets)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        for position in torch.randint(min(len(whole), 1500), (3,), generator=generator).tolist():
            damaged[position] = int(torch.randint(256, (), generator=generator))
        file.write_bytes(damaged)
        try:
            ModelFolder.open(folder)
        except ModelError:
            refused += 1
        file.write_bytes(whole)
    assert refused > 250
