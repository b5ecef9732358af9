"""The reference norm and SwiGLU against Hugging Face, the published implementation, float64 and dense selection."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megashear.ops import reference

PUBLISHED = Path(__file__).parent / "fixtures" / "published_ops.npz"


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    with np.load(PUBLISHED) as arrays:
        return {name: torch.from_numpy(arrays[name].astype(np.float64)) for name in arrays.files}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_norm_has_the_bits_of_hugging_face(dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = (3 * torch.randn(5, 7, 48)).to(dtype)
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5, torch.ones(48)), norm(x))


def test_masked_norm_is_the_published_one(published):
    x, w, z = published["E/x"], published["E/w"], published["E/z"]
    plain = reference.rms_norm(x, w, 1e-5)
    masked = reference.rms_norm(x, w, 1e-5, z)
    # the published norm computes in fp32, hence a tolerance of a few of its roundings
    torch.testing.assert_close(plain, published["E/out_plain"], rtol=5e-7, atol=1e-7)
    torch.testing.assert_close(masked, published["E/out_masked"], rtol=5e-7, atol=1e-7)


def test_masked_norm_is_the_norm_of_the_live_dimensions():
    torch.manual_seed(1)
    x, w = torch.randn(6, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    live = torch.rand(20) < 0.6
    out = reference.rms_norm(x, w, 1e-5, live.double())
    torch.testing.assert_close(out[:, live], reference.rms_norm(x[:, live], w[live], 1e-5), rtol=1e-14, atol=1e-14)
    assert (out[:, ~live] == 0).all()
    assert (reference.rms_norm(x, w, 1e-5, torch.zeros(20)) == 0).all()


def test_norm_gradients():
    torch.manual_seed(2)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(8, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, m: reference.rms_norm(x, w, 1e-5, m), (x, w, soft))
    dead = torch.tensor([0.0, 1, 1, 0, 0.5, 1, 0, 1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-5, dead), (x, w))


def test_mask_gradient_comes_only_from_product():
    torch.manual_seed(3)
    x, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    mask = torch.tensor([0.0, 1, 0.5, 0, 1, 1], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 6, dtype=torch.float64)
    reference.rms_norm(x, w, 1e-5, mask).backward(upstream)
    live = mask.detach() != 0
    scale = (x[:, live].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(mask.grad, (upstream * w * x * scale).sum(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_residual_addition_rounds_once(dtype):
    torch.manual_seed(7)
    x, branch = torch.randn(5, 12).to(dtype), torch.randn(5, 12).to(dtype)
    weight, factor, mask = torch.randn(12), torch.rand(12), torch.tensor([0.0, 1, 0.5] * 4)
    total, out = reference.add_rms_norm(x, branch, factor, weight, 1e-5, mask)
    exact = x.double() + branch.double() * factor.double()
    unit = torch.finfo(dtype).eps / 2
    assert ((total.double() - exact).abs() <= unit * exact.abs() + 2.0**-22).all()
    assert torch.equal(out, reference.rms_norm(total, weight, 1e-5, mask))
    assert total.dtype == out.dtype == dtype
    assert torch.equal(reference.add_rms_norm(x, branch, None, weight, 1e-5)[0], x + branch)


def test_residual_addition_gradients():
    torch.manual_seed(8)
    matrices = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    vectors = [torch.rand(6, dtype=torch.float64).add(0.1).requires_grad_() for _ in range(3)]

    def form(x, branch, factor, weight, mask):
        return reference.add_rms_norm(x, branch, factor, weight, 1e-5, mask)

    assert torch.autograd.gradcheck(form, (*matrices, *vectors))
    assert torch.autograd.gradcheck(form, (*matrices, None, vectors[1], None))


def test_swiglu_is_silu_times_up_times_mask():
    torch.manual_seed(4)
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.rand(5, dtype=torch.float64)
    out = reference.swiglu(torch.cat((gate, up), dim=-1), mask)
    torch.testing.assert_close(out, gate * torch.sigmoid(gate) * up * mask, rtol=1e-14, atol=1e-15)
    assert torch.equal(reference.swiglu(torch.cat((gate, up), dim=-1)), F.silu(gate) * up)


def test_swiglu_rounds_once():
    torch.manual_seed(5)
    gate_up, mask = torch.randn(64, 34).bfloat16(), torch.rand(17)
    exact = reference.swiglu(gate_up.double(), mask.double())
    assert ((reference.swiglu(gate_up, mask).double() - exact).abs() <= 2.0**-8 * 1.001 * exact.abs()).all()


def test_swiglu_gradients():
    torch.manual_seed(6)
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([0.0, 1.0, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.swiglu, (gate_up, mask))
    assert torch.autograd.gradcheck(reference.swiglu, (gate_up,))
