"""Hugging Face -> import -> export -> transformers: the same bytes, the same logits, or a refusal and no folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from hf.llama_variants import VARIANTS
from megashear.errors import ModelError
from megashear.hf import export_model as export_folder
from megashear.hf import verify_export as verify
from megashear.hf.export_model import export_model
from megashear.hf.import_model import import_model
from megashear.hf.model_folder import ModelFolder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_round_keeps_bytes_and_logits(llama_folder, tmp_path, variant, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = llama_folder(dtype=dtype, **VARIANTS[variant]), tmp_path / "out"
    import_model(source, tmp_path / "imported")
    export_model(tmp_path / "imported", out)
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes(), file
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, out))
    ids = torch.arange(80)[None]
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits) and after.dtype == dtype
    ignored = {"_name_or_path", "transformers_version"}
    old, new = (network.config.to_dict() for network in (before, after))
    assert {key: old[key] for key in old.keys() - ignored} == {key: new.get(key) for key in old.keys() - ignored}
    assert AutoTokenizer.from_pretrained(out)("A B").input_ids == [65, 66]
    assert ModelFolder.open(out, digests=True).digest() == ModelFolder.open(source).digest()


def test_shards_keep_their_bytes(llama_folder, tmp_path):
    source = llama_folder(max_shard_size=20_000, **VARIANTS["grouped"])
    import_model(source, tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "out", max_shard_gb=20_000 / 1e9)
    files = sorted(path.name for path in source.glob("model*"))
    assert len(files) > 4 and files == sorted(path.name for path in (tmp_path / "out").glob("model*"))
    for file in files:
        ours, theirs = (tmp_path / "out" / file).read_bytes(), (source / file).read_bytes()
        assert ours == theirs or (file.endswith(".json") and json.loads(ours) == json.loads(theirs))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dtypes(llama_folder, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    source = llama_folder(**VARIANTS["tied"])
    export_model(source, tmp_path / "out", dtype)
    kind = export_folder.DTYPES[dtype]
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert network.dtype == kind
    original = ModelFolder.open(source)
    assert all(torch.equal(network.state_dict()[name], original.read(name).to(kind)) for name in original.tensors)


def test_a_run_folder_means_its_final_model(llama_folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ModelError, match="neither a model folder"):
        export_model(run, tmp_path / "out")
    import_model(llama_folder(**VARIANTS["grouped"]), run / "final")
    export_model(run, tmp_path / "out")
    assert ModelFolder.open(tmp_path / "out").digest() == ModelFolder.open(run / "final").digest()
    (run / "final/manifest.json").unlink()
    with pytest.raises(ModelError, match=r"manifest\.json: not found"):
        export_model(run, tmp_path / "other")


def test_an_output_that_exists(llama_folder, tmp_path, capsys):
    source, out = llama_folder(**VARIANTS["grouped"]), tmp_path / "out"
    export_model(source, out)
    export_model(source, out)
    assert "already exported" in capsys.readouterr().out
    with pytest.raises(ModelError, match="exists and is not this export"):
        export_model(source, out, "bf16")
    with pytest.raises(ModelError, match="exists and is not this export"):
        export_model(source, source)
    assert ModelFolder.open(out, digests=True).dtype == torch.float32


def test_generation_config_from_token_ids(llama_folder, tmp_path):
    source = llama_folder(bos_token_id=5, eos_token_id=[6, 7], **VARIANTS["grouped"])
    (source / "generation_config.json").unlink()
    export_model(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {
        "bos_token_id": 5,
        "eos_token_id": [6, 7],
    }


def damage_logits(folder, model, dtype):
    """A wrong value in one tensor of a folder that is otherwise whole, before the proof."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2:] = b"\x80\xc0"  # the last fp32 of the last tensor in the file becomes -4
    file.write_bytes(content)
    return verify.verify_export(folder, model, dtype)


def drop_a_tensor(folder, model, dtype):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return verify.verify_export(folder, model, dtype)


def wrong_config(folder, model, dtype):
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 20000.0
    (folder / "config.json").write_text(json.dumps(config))
    return verify.verify_export(folder, model, dtype)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (damage_logits, "logits by transformers differ"),
        (drop_a_tensor, r"missing_keys: model\.layers\.1\.mlp\.up_proj\.weight"),
        (wrong_config, "logits by transformers differ"),
    ],
)
def test_a_proof_that_fails_leaves_no_folder(llama_folder, tmp_path, monkeypatch, fault, said):
    source = llama_folder(**VARIANTS["grouped"])
    monkeypatch.setattr(export_folder, "verify_export", fault)
    with pytest.raises(ModelError, match=said):
        export_model(source, tmp_path / "exports/out")
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_tokenizer_of_another_model_is_refused(llama_folder, tmp_path):
    source = llama_folder(**VARIANTS["grouped"])
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Once"] = 96
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="gives id 96, the vocabulary has 96 rows"):
        export_model(source, tmp_path / "out")
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="does not load its tokenizer"):
        export_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PEAK = """
import sys
from pathlib import Path
import torch
from megashear.hf.export_model import write_export
from megashear.hf.model_folder import ModelFolder

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")  # the peak so far, of loading torch, is forgotten
before = status("VmRSS")
write_export(ModelFolder.open(Path(sys.argv[1])), Path(sys.argv[2]), torch.bfloat16, 5.0, {})
print("peak", status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
@pytest.mark.medium
def test_memory_of_the_writing(llama_folder, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 96}
    network = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4))
    network.save_pretrained(tmp_path / "source")
    del network
    model = ModelFolder.open(tmp_path / "source")
    limit = 2 * max(entry.count for entry in model.tensors.values()) * 4 + 200 * 2**20
    assert model.bytes() > 1.5 * limit, "the whole model would not fit"
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(model.path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    shutil.rmtree(tmp_path / "source")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("peak")[1]) <= limit
