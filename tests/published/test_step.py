"""One training step with the published noise: samples, loss, Lagrangian, and every gradient, through the real step."""

import pytest
import torch

from megashear.engine.optimizer import unwrap
from megashear.model.micro_batch import micro_batches
from megashear.model.weight_io import gather_tensors

from . import rounding
from .case import GRANULARITIES, ROWS, SOURCE, STEP_OF_B, build_masks, build_model, build_stepper, deviation

# The published norm, softmax and noise's logit round to float32 (6e-8), forward and backward; our cross entropy too.
TOLERANCE = 1e-6
FUNCTION = {torch.float64: 1e-9, torch.float32: 1e-6}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture
def state(arrays, layout, prune, dtype):
    masks = build_masks(arrays, layout, prune, "B/log_alpha", "B/multipliers", dtype)
    masks.masks.noise = {STEP_OF_B: arrays.group("B/noise")}
    return masks


def test_log_alpha_is_projected_and_sampled(arrays, state, dtype):
    for name, value in state.masks.log_alpha.items():
        assert deviation(value, arrays[f"B/log_alpha_clamped/{name}"]) < FUNCTION[dtype]
    # The published code takes the noise's logit, below 8 here, in float32; a sample's slope is below 0.45.
    sampled = state.masks.sample(0, STEP_OF_B, 0)
    for kind, theirs in arrays.group("B/masks").items():
        torch.testing.assert_close(
            getattr(sampled, kind).detach().cpu().double(), theirs, rtol=0, atol=0.45 * 2**-23 * 8 + FUNCTION[dtype]
        )


def test_samples_of_the_published_logit(arrays, layout, prune):
    """With the noise's logit rounded as theirs, samples are equal, exact zeros and ones too."""
    masks = build_masks(arrays, layout, prune, "B/log_alpha", None, torch.float64)
    masks.masks.noise = {0: {name: rounding.noise(u) for name, u in arrays.group("B/noise").items()}}
    sampled = masks.masks.sample(0, 0, 0)
    for kind, theirs in arrays.group("B/masks").items():
        ours = getattr(sampled, kind).detach().cpu()
        assert torch.equal(ours == 0, theirs == 0) and torch.equal(ours == 1, theirs == 1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_losses_and_all_gradients(arrays, layout, prune, state, dtype):
    module = build_model(layout, SOURCE, arrays.group("weights"), prune, dtype)
    stepper = build_stepper(layout, module, state, prune, dtype)
    batches = micro_batches(arrays["tokens"], layout, ROWS, layout.device)
    loss = float(stepper.forward_backward(batches, STEP_OF_B))
    lagrangian, info = state.add_constraint_gradients(STEP_OF_B)
    cross_entropy, theirs, total = arrays["B/losses"].tolist()
    assert loss == pytest.approx(cross_entropy, rel=TOLERANCE)
    assert float(lagrangian) == pytest.approx(theirs, abs=FUNCTION[dtype])
    assert loss + float(lagrangian) == pytest.approx(total, rel=TOLERANCE)
    for column, name in enumerate(GRANULARITIES):
        assert float(info["expected"][name]) == pytest.approx(float(arrays["B/expected"][column]), abs=FUNCTION[dtype])
        assert info["target"][name] == pytest.approx(float(arrays["B/target"][column]), abs=1e-12)
        far = deviation(state.masks.log_alpha[name].grad, arrays[f"B/log_alpha_gradient/{name}"])
        assert far < (TOLERANCE if dtype == torch.float64 else 1e-5), name
        pair = state.constraint.multipliers[name].grad.cpu().double()
        torch.testing.assert_close(pair, arrays[f"B/multipliers_gradient/{name}"], rtol=0, atol=FUNCTION[dtype])
    gradients = dict(gather_tensors(unwrap(stepper.weights.chunks[0]), gradient_of(dtype)))
    assert gradients.keys() == arrays.group("weights").keys()
    for name, gradient in gradients.items():
        published = arrays[f"B/gradient/{name}"]
        # Where the sampled layer is 0 the published gradients are exactly 0; `deviation` wants ours to be so too.
        assert deviation(gradient, published) < (TOLERANCE if dtype == torch.float64 else 1e-5), name


def gradient_of(dtype):
    """The reduced float32 buffer under the real optimizer."""
    return (lambda p: p.main_grad) if dtype == torch.float32 else (lambda p: p.grad)
