"""The choice between the kernels of attention and torch's: by results first, then by the clock, once for each shape.

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
from megashear.ops.kernels import attention_backend as choice

from .agreement import leaf
from .test_attention import _case

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.parametrize("device", ["cpu"], indirect=True)]


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(choice, "_CHOICES", {})


def _shape(**facts) -> choice.Shape:
    usual = {"dtype": torch.float32, "tokens": 40, "head_dim": 16, "documents": False}
    return choice.Shape(torch.device("cpu"), **(usual | facts))


SAMPLE = choice.Sample(2, 4, 2, masked=True)


def _forms(**facts) -> tuple[choice.Form, choice.Form]:
    """The best kernel here, and torch's."""
    forms = list(choice.forms(_shape(**facts), SAMPLE).values())
    return forms[0], forms[-1]


def _slow(form: choice.Form) -> choice.Form:
    def run():
        time.sleep(0.02)
        return form()

    return run


@pytest.mark.parametrize("documents", [False, True])
def test_fastest_backend_is_selected(documents):
    kernel, plain = _forms(documents=documents)
    for fastest in ("one", "two", "reference"):
        forms = {"one": kernel, "two": kernel, "reference": plain}
        slowed = {name: form if name == fastest else _slow(form) for name, form in forms.items()}
        found = choice.choose(slowed, 1e-4)
        assert found.serves == fastest == min(found.milliseconds, key=found.milliseconds.get)
        assert set(found.milliseconds) == set(forms) and set(found.distances) == {"one", "two"}
        assert max(found.distances.values()) < 1e-5


def test_wrong_backend_is_excluded():
    kernel, plain = _forms()
    case = _case(2, 4, 2, 40, 16, torch.float32, masked=True)

    def other():
        """Without causality."""
        leaves = [leaf(x) for x in (case.q, case.k, case.v, case.mask)]
        out = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], enable_gqa=True)
        out = out * leaves[3][:, None, None]
        return [out.detach(), *torch.autograd.grad(out, leaves, case.dout)]

    def broken():
        return [torch.full_like(part, float("nan")) for part in plain()]

    for wrong in (other, broken):
        with pytest.warns(UserWarning, match="does not use wrong"):
            assert choice.choose({"wrong": wrong, "reference": plain}, 1e-4).serves == "reference"
        with pytest.warns(UserWarning, match="does not use wrong"):
            found = choice.choose({"wrong": wrong, "right": kernel, "reference": _slow(plain)}, 1e-4)
        assert found.serves == "right" and set(found.milliseconds) == {"right", "reference"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [{"masked": True}, {"documents": True}, {}])
def test_each_shape_is_measured_once(dtype, parts, caplog):
    case = _case(2, 4, 2, 70, 32, dtype, **parts)
    inputs = (case.q, case.k, case.mask, case.first)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        chosen = [choice.serving(*inputs) for _ in range(3)]
        with torch.inference_mode():
            chosen.append(choice.serving(*inputs))
    assert len(set(chosen)) == 1 and len(choice._CHOICES) == len(caplog.records) == 1
    (line,) = ops.attention_choices()
    assert line == caplog.messages[0].removeprefix("attention of ")
    found = next(iter(choice._CHOICES.values()))
    assert found.serves == min(found.milliseconds, key=found.milliseconds.get) == chosen[0]
    assert all(0 < distance <= choice.LIMITS[dtype] for distance in found.distances.values())
    assert torch.equal(state, torch.get_rng_state())


def test_shape_key_is_tokens_and_documents():
    q, k = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16)
    first = torch.zeros(2, 20, dtype=torch.int32)
    calls = [((q, k, None, None), 1), ((q[:1], k[:1], None, None), 1), ((q[:, :2], k[:, :1], torch.ones(2), None), 1)]
    for inputs, shapes in [*calls, ((q[:, :, :10], k[:, :, :10], None, None), 2), ((q, k, None, first), 3)]:
        choice.serving(*inputs)
        assert len(choice._CHOICES) == shapes


def test_new_shape_is_measured_in_inference_mode():
    case = _case(1, 2, 2, 20, 16, torch.float32, masked=True, documents=True)
    with torch.inference_mode():
        choice.serving(case.q, case.k, case.mask, case.first.clone())
    assert len(choice._CHOICES) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_new_shape_is_measured_in_recomputation(reentrant):
    case = _case(1, 4, 2, 20, 16, torch.float32, masked=True)

    def part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        form = reference.attention if choice.serving(q, k, mask, None) == "reference" else ops.attention
        return form(q, k, v, mask)

    results = []
    for recomputed in (True, False):
        leaves = [leaf(x) for x in (case.q, case.k, case.v, case.mask)]
        out = checkpoint(part, *leaves, use_reentrant=reentrant) if recomputed else part(*leaves)
        out.backward(case.dout)
        results.append([out, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and len(choice._CHOICES) == 1


def test_compiling_or_forced_backend_skips_measuring(monkeypatch):
    case = _case(1, 2, 2, 20, 16, torch.float32)
    asked = torch.compile(
        lambda q: q + float(choice.serving(q, case.k, None, None) != "reference"), backend="eager", fullgraph=True
    )
    assert torch.equal(asked(case.q), case.q) and not choice._CHOICES
    for wish in choice.FORCED_BACKENDS:
        monkeypatch.setenv("MEGASHEAR_ATTENTION", wish)
        assert choice.serving(case.q, case.k, None, None) == wish
    assert not choice._CHOICES
    monkeypatch.setenv("MEGASHEAR_ATTENTION", "fastest")
    with pytest.raises(ConfigError, match="MEGASHEAR_ATTENTION"):
        choice.serving(case.q, case.k, None, None)


def test_the_cpu_is_not_measured():
    case = _case(1, 2, 2, 20, 16, torch.float32)
    out = ops.attention(case.q, case.k, case.v)
    torch.testing.assert_close(out, reference.attention(case.q, case.k, case.v))
    assert not choice._CHOICES
