"""The choice between the kernel of attention and torch's: by results first, then by the clock, once for each shape.

On the CPU here, where the rule is the same and the times are real ones of the two forms.
"""

import logging
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megashear import ops
from megashear.errors import ConfigError
from megashear.ops import reference
from megashear.ops.kernels import attention_choice as choice

from .agreement import leaf
from .test_attention import _case

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.parametrize("device", ["cpu"], indirect=True)]


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(choice, "_CHOICES", {})


def _shape(dtype: torch.dtype = torch.float32, **facts) -> choice.Shape:
    sizes = {"heads": 4, "groups": 2, "tokens": 40, "head_dim": 16, "masked": True, "documents": False}
    return choice.Shape(torch.device("cpu"), dtype, **(sizes | facts))


def test_the_faster_form_is_taken():
    compiled, plain = choice.forms(_shape(), 2, None)

    def slow(form):
        def run():
            time.sleep(0.02)
            return form()

        return run

    fast = choice.choose(compiled, slow(plain), 1e-4)
    assert fast.compiled and fast.compiled_ms < fast.reference_ms and fast.distance < 1e-5
    assert not choice.choose(slow(compiled), plain, 1e-4).compiled


def test_a_form_that_computes_something_else_is_not_taken():
    compiled, plain = choice.forms(_shape(), 2, None)
    case = _case(2, 4, 2, 40, 16, torch.float32, masked=True)

    def other():
        """Without causality."""
        leaves = [leaf(x) for x in (case.q, case.k, case.v, case.mask)]
        out = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], enable_gqa=True)
        out = out * leaves[3][:, None, None]
        return [out.detach(), *torch.autograd.grad(out, leaves, case.dout)]

    def broken():
        return [torch.full_like(part, float("nan")) for part in plain()]

    for form in (other, broken):
        with pytest.warns(UserWarning, match="left to torch"):
            assert not choice.choose(form, plain, 1e-4).compiled
    assert choice.choose(compiled, plain, 1e-4).distance <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [{"masked": True}, {"documents": True}, {}])
def test_each_shape_is_measured_once(dtype, parts, caplog):
    case = _case(2, 4, 2, 70, 32, dtype, **parts)
    inputs = (case.q, case.k, case.v, case.mask, case.first)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        chosen = [choice.kernel_is_chosen(*inputs) for _ in range(3)]
        with torch.inference_mode():
            chosen.append(choice.kernel_is_chosen(*inputs))
    assert len(set(chosen)) == 1 and len(choice._CHOICES) == len(caplog.records) == 1
    (line,) = ops.attention_choices()
    assert line == caplog.messages[0].removeprefix("attention of ")
    found = next(iter(choice._CHOICES.values()))
    assert found.compiled == (found.compiled_ms <= found.reference_ms) == chosen[0]
    assert 0 < found.distance <= choice.LIMITS[dtype]
    assert torch.equal(state, torch.get_rng_state())


def test_the_batch_is_no_part_of_a_shape_but_the_tokens_are():
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    for sizes, shapes in ((2, 20), 1), ((1, 20), 1), ((2, 10), 2):
        choice.kernel_is_chosen(*(x[: sizes[0], :, : sizes[1]] for x in (q, k, v)), None, None)
        assert len(choice._CHOICES) == shapes


def test_a_first_shape_is_measured_under_inference_mode_too():
    case = _case(1, 2, 2, 20, 16, torch.float32, masked=True, documents=True)
    with torch.inference_mode():
        choice.kernel_is_chosen(case.q, case.k, case.v, case.mask, case.first.clone())
    assert len(choice._CHOICES) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_first_shape_is_measured_inside_a_recomputed_part_too(reentrant):
    case = _case(1, 4, 2, 20, 16, torch.float32, masked=True)

    def part(*inputs: torch.Tensor) -> torch.Tensor:
        form = ops.attention if choice.kernel_is_chosen(*inputs, None) else reference.attention
        return form(*inputs)

    results = []
    for recomputed in (True, False):
        leaves = [leaf(x) for x in (case.q, case.k, case.v, case.mask)]
        out = checkpoint(part, *leaves, use_reentrant=reentrant) if recomputed else part(*leaves)
        out.backward(case.dout)
        results.append([out, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and len(choice._CHOICES) == 1


def test_nothing_is_measured_while_torch_compiles_or_the_environment_decides(monkeypatch):
    case = _case(1, 2, 2, 20, 16, torch.float32)
    asked = torch.compile(
        lambda q: q + float(choice.kernel_is_chosen(q, case.k, case.v, None, None)), backend="eager", fullgraph=True
    )
    assert torch.equal(asked(case.q), case.q) and not choice._CHOICES
    for wish in ("compiled", "reference"):
        monkeypatch.setenv("MEGASHEAR_ATTENTION", wish)
        assert choice.kernel_is_chosen(case.q, case.k, case.v, None, None) == (wish == "compiled")
    assert not choice._CHOICES
    monkeypatch.setenv("MEGASHEAR_ATTENTION", "fastest")
    with pytest.raises(ConfigError, match="MEGASHEAR_ATTENTION"):
        choice.kernel_is_chosen(case.q, case.k, case.v, None, None)


def test_the_cpu_is_not_measured():
    case = _case(1, 2, 2, 20, 16, torch.float32)
    out = ops.attention(case.q, case.k, case.v)
    torch.testing.assert_close(out, reference.attention(case.q, case.k, case.v))
    assert not choice._CHOICES
