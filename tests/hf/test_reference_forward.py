"""Our definition of a LLaMA gives transformers' logits, and notices what is not equal."""

import pytest
import torch

from hf.llama_variants import VARIANTS
from megashear.hf.model_folder import ModelFolder
from megashear.hf.verify_export import reference_logits


def theirs(folder, ids):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return network(ids).logits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_transformers(llama_folder, variant, dtype):
    folder = llama_folder(dtype=dtype, **VARIANTS[variant])
    ids = torch.randint(96, (2, 100), generator=torch.Generator().manual_seed(1))
    expected = theirs(folder, ids)
    ours = reference_logits(ModelFolder.open(folder), ids)
    # fp32 rounds at 6e-8; three layers of products over at most 48 terms stay within a hundred roundings.
    assert (ours - expected).abs().max() <= 6e-6 * expected.abs().max()


def test_rounding_of_weights(llama_folder):
    folder = llama_folder(**VARIANTS["tied"])
    rounded = llama_folder("rounded", dtype=torch.bfloat16, **VARIANTS["tied"])
    ids = torch.arange(40)[None]
    exact = reference_logits(ModelFolder.open(folder), ids)
    ours = reference_logits(ModelFolder.open(folder), ids, torch.bfloat16)
    assert torch.equal(ours, reference_logits(ModelFolder.open(rounded), ids))
    assert (ours - exact).abs().max() > 1e-3 * exact.abs().max()
