"""Import: a copy that is the source bit for bit, made with one tensor in memory."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from megashear.errors import ModelError
from megashear.hf.import_model import import_model
from megashear.hf.model_folder import ModelFolder
from megashear.hf.safetensors_writer import ShardedWriter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_single_file_keeps_its_bytes(make_folder, tmp_path, capsys, dtype, tied):
    source = make_folder(dtype=dtype, tie_word_embeddings=tied)
    (source / "LICENSE").write_text("terms")
    import_model(source, tmp_path / "imported")
    for file in ("model.safetensors", "tokenizer.json", "LICENSE"):
        assert (tmp_path / "imported" / file).read_bytes() == (source / file).read_bytes()
    model = ModelFolder.open(tmp_path / "imported", digests=True)
    assert model.provenance["source"]["path"] == str(source)
    assert model.config["eos_token_id"] == [2, 3]
    printed = capsys.readouterr().out
    assert model.digest() in printed and f"{model.shape.parameters():,}" in printed and "2 layers" in printed


def test_shards_and_mixed_dtypes_keep_their_tensors(make_folder, tmp_path):
    def norms_wide(tensors):
        tensors.update({name: t.double() for name, t in tensors.items() if "norm" in name})

    source = ModelFolder.open(make_folder(shards=3, dtype=torch.bfloat16, change=norms_wide))
    import_model(source.path, tmp_path / "imported")
    imported = ModelFolder.open(tmp_path / "imported")
    assert imported.dtypes == source.dtypes
    assert all(torch.equal(imported.read(name), source.read(name)) for name in source.tensors)


def test_an_output_that_exists(make_folder, tmp_path, capsys):
    source, output = make_folder(), tmp_path / "imported"
    import_model(source, output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    import_model(source, output)
    assert "already holds this model" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    with pytest.raises(ModelError, match="exists and does not hold this model"):
        import_model(make_folder("other", rope_theta=5e5), output)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="exists and does not hold this model"):
        import_model(source, output)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    with pytest.raises(ModelError, match="exists and does not hold this model"):
        import_model(source, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "dear"


def test_a_refused_source_leaves_nothing(make_folder, tmp_path):
    def broken(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    with pytest.raises(ModelError, match=r"source: tensor model\.norm\.weight holds NaN"):
        import_model(make_folder(change=broken), tmp_path / "out/imported")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_imported_folder_that_was_damaged_is_not_imported_again(make_folder, tmp_path):
    import_model(make_folder(), tmp_path / "imported")
    file = tmp_path / "imported/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"not what .* holds"):
        import_model(tmp_path / "imported", tmp_path / "again")
    assert not (tmp_path / "again").exists()


PEAK = """
import sys
from pathlib import Path
from megashear.hf.import_model import import_model

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")  # the peak so far, of loading torch, is forgotten
before = status("VmRSS")
import_model(Path(sys.argv[1]), Path(sys.argv[2]))
print("peak", status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
@pytest.mark.medium
def test_memory_is_two_of_the_largest_tensors_at_most(make_folder, tmp_path):
    source = make_folder()
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_key_value_heads": 4}
    shutil.rmtree(source)
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    write_zeros(source, config)
    model = ModelFolder.open(source)
    largest = max(entry.count for entry in model.tensors.values()) * 4
    limit = 2 * largest + 200 * 2**20
    assert model.bytes() > 1.5 * limit, "the whole model would not fit"
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(tmp_path / "imported")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("peak")[1]) <= limit


def write_zeros(folder, config):
    from megashear.hf.hf_config import shape_of_config
    from megashear.hf.tensor_names import tensor_shapes

    with ShardedWriter.create(folder, tensor_shapes(shape_of_config(config, folder)), torch.float32) as writer:
        for name, place in writer.places.items():
            writer.write(name, torch.zeros(place.shape))
    ShardedWriter.finish(folder)
