"""The CPU in CUDA's stead: megatron-core sees it, everything else sees torch as it is. One process a case."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="acts only without a GPU")

BEFORE = """
import torch, torch.cuda
names = ("tensor", "zeros", "ones", "empty", "full", "arange")
before = [getattr(torch, n) for n in names] + [torch.cuda.current_device, torch.cuda.synchronize]
"""
PRESENT = """
import megashear.engine.parallel
from megashear.engine.device import present_cpu
present_cpu(); present_cpu()
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-Wignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_present_cpu_patches_megatron_and_not_torch() -> None:
    run(
        BEFORE
        + PRESENT
        + """
after = [getattr(torch, n) for n in names] + [torch.cuda.current_device, torch.cuda.synchronize]
assert all(a is b for a, b in zip(before, after)), "torch was changed"
try:
    torch.zeros(2, device="cuda")
except (RuntimeError, AssertionError):
    pass
else:
    raise SystemExit("a CUDA tensor on a machine without CUDA")
assert torch.zeros(2).type(torch.float64).dtype == torch.float64
assert torch.zeros(2, dtype=torch.int64).type() == "torch.LongTensor"
from megatron.core.tensor_parallel import layers
assert layers.torch is not torch
assert layers.torch.cuda.current_device() == torch.device("cpu")
for name in ("zeros", "ones", "empty"):
    assert getattr(layers.torch, name)(3, device="cuda").device.type == "cpu"
assert layers.torch.nn is torch.nn and layers.torch.Tensor is torch.Tensor
assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
"""
    )


@pytest.mark.medium
def test_transformers_model_keeps_rotary_buffers() -> None:
    run(
        PRESENT
        + """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
model = LlamaForCausalLM(LlamaConfig(**sizes))
wanted = 1.0 / 10000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
found = model.model.rotary_emb.inv_freq
assert found.device.type == "cpu" and torch.allclose(found.double(), wanted, rtol=1e-6), found
assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
"""
    )
