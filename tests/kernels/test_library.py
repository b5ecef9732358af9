"""Which form serves: compiled where built, the reference for other dtypes, other devices and on request."""

import pytest
import torch

from megashear import ops
from megashear.errors import ConfigError
from megashear.ops import reference


def test_backend_names_what_serves_each_op(device, monkeypatch):
    serving = ops.backend(device)
    choosing = {"choose_attention_backend", "measure_attention"}
    choosing |= {name for name in ops.__all__ if name.startswith("Attention")}
    assert set(serving) == set(ops.__all__) - {"backend", "attention_choices"} - choosing
    assert serving["swiglu"] == f"compiled-{device.type}" and serving["apply_rope"] == "reference"
    monkeypatch.setenv("MEGASHEAR_KERNELS", "reference")
    assert set(ops.backend(device).values()) == {"reference"}


def test_the_reference_can_be_forced(device, monkeypatch):
    called = []
    monkeypatch.setattr(reference, "swiglu", lambda *inputs: called.append(inputs))
    x = torch.zeros(2, 4, device=device)
    ops.swiglu(x)
    assert not called
    monkeypatch.setenv("MEGASHEAR_KERNELS", "reference")
    ops.swiglu(x)
    assert len(called) == 1


def test_unknown_kernel_choice_is_refused(monkeypatch):
    monkeypatch.setenv("MEGASHEAR_KERNELS", "fastest")
    with pytest.raises(ConfigError, match="MEGASHEAR_KERNELS"):
        ops.backend()


def test_float64_takes_the_reference(device):
    x = torch.randn(4, 6, device=device, dtype=torch.float64)
    mask = torch.rand(3, device=device)
    assert torch.equal(ops.swiglu(x, mask), reference.swiglu(x, mask))
    wide_mask = torch.rand(6, device=device)
    assert torch.equal(ops.rms_norm(x, wide_mask, 1e-5, wide_mask), reference.rms_norm(x, wide_mask, 1e-5, wide_mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_masks_other_than_fp32_use_reference(dtype, device):
    x, noise = torch.randn(4, 6, device=device).to(dtype), torch.full((4, 6), 0.3, device=device)
    assert torch.equal(ops.hard_concrete(x, noise), reference.hard_concrete(x, noise))


def test_devices_without_kernels_take_the_reference():
    assert ops.swiglu(torch.empty(3, 8, device="meta"), torch.empty(4, device="meta")).shape == (3, 4)
