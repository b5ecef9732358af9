"""The published 24 optimizer steps, one after another through the real step: data, noise and settings given.

Three ways: float64 with torch's Adam for the weights; float32 with megatron-core's gradient buffers and distributed
optimizer; float64 with the published float32 roundings, in which nothing is left to differ. Adam divides a gradient by
its own size, so an element whose gradient is near eps = 1e-8 turns a gradient error of e into a step of rate * e / eps.
In float32 e is about 2^-24 of the tensor's largest gradient, 1e-2: a twentieth of the rate for single elements, whence
the tolerances of log-alpha and of the weights' movement; their root mean square is far smaller.
"""

from dataclasses import dataclass

import pytest
import torch

from megashear.engine.optimizer import unwrap
from megashear.model.micro_batch import micro_batches
from megashear.model.weight_io import gather_tensors
from megashear.train.learning_rate import PRUNE_WARMUP_SHARE, learning_rate_factor

from . import rounding
from .case import GRANULARITIES, ROWS, SOURCE, STEPS, build_masks, build_model, build_stepper, deviation


@dataclass(frozen=True)
class Way:
    """Largest relative deviations (of the Lagrangian and the sparsities: absolute ones)."""

    dtype: torch.dtype
    loss: float
    constraint: float
    log_alpha: float
    multipliers: float
    movement: float  # of single weights, as a share of the largest movement
    movement_rms: float
    published_rounding: bool = False


WAYS = {
    "float64": Way(torch.float64, 1e-6, 1e-6, 1e-5, 1e-6, 5e-5, 5e-7),
    "float32": Way(torch.float32, 1e-6, 1e-5, 1e-4, 1e-5, 1e-2, 1e-4),
    "published rounding": Way(torch.float64, 1e-9, 1e-9, 1e-7, 1e-9, 2e-6, 3e-8, True),
}


@pytest.fixture(params=WAYS)
def way(request, layout, monkeypatch):
    chosen = WAYS[request.param]
    if chosen.published_rounding:
        if layout.device.type != "cpu" or not rounding.same_bits():
            pytest.skip("this host's float32 softmax has other last bits than the one of the published arrays")
        rounding.put_in_place(monkeypatch)
    return chosen


def noise_of(arrays, way):
    uniform = arrays.group("F/noise")
    if way.published_rounding:
        uniform = {name: rounding.noise(u) for name, u in uniform.items()}
    return {step: {name: u[step] for name, u in uniform.items()} for step in range(STEPS)}


def test_the_learning_rate_follows_the_published_factors(arrays, prune):
    for step, factor in enumerate(arrays["F/learning_rate_factor"].tolist()):
        ours = learning_rate_factor(step, prune.batch.steps, prune.optimizer, PRUNE_WARMUP_SHARE)
        assert ours == pytest.approx(factor, abs=1e-15)


def test_24_steps(arrays, layout, prune, way):
    module = build_model(layout, SOURCE, arrays.group("weights"), prune, way.dtype)
    masks = build_masks(arrays, layout, prune, "F/log_alpha_start", None, way.dtype)
    masks.masks.noise = noise_of(arrays, way)
    stepper = build_stepper(layout, module, masks, prune, way.dtype)
    for step in range(STEPS):
        factor = learning_rate_factor(step, prune.batch.steps, prune.optimizer, PRUNE_WARMUP_SHARE)
        batches = micro_batches(arrays["F/tokens"][step], layout, ROWS, layout.device)
        result = stepper.run(batches, step, factor, factor * prune.optimizer.learning_rate)
        check_result(arrays, way, step, result)
        check_masks(arrays, way, step, masks, prune.log_alpha_limit)
    check_weights(arrays, way, unwrap(stepper.weights.chunks[0]))


def check_result(arrays, way, step, result):
    loss, lagrangian, total = arrays["F/losses"][step].tolist()
    assert not result.skipped
    assert result.loss == pytest.approx(loss, rel=way.loss), step
    assert result.lagrangian == pytest.approx(lagrangian, abs=way.constraint), step
    # The sum passes through 0, so its parts' tolerances hold it, not its own size.
    assert result.loss + result.lagrangian == pytest.approx(total, abs=way.loss * loss + way.constraint), step
    assert result.grad_norm == pytest.approx(float(arrays["F/grad_norm"][step]), rel=way.loss), step
    for column, name in enumerate(GRANULARITIES):
        expected, target = (float(arrays[f"F/{kind}"][step, column]) for kind in ("expected", "target"))
        assert float(result.sparsity["expected"][name]) == pytest.approx(expected, abs=way.constraint), (step, name)
        assert result.sparsity["target"][name] == pytest.approx(target, abs=1e-12), (step, name)


def check_masks(arrays, way, step, masks, limit):
    """Log-alpha is projected after the step here, before the next one there."""
    for name in GRANULARITIES:
        log_alpha = arrays[f"F/log_alpha/{name}"][step].clamp(-limit, limit)
        assert deviation(masks.masks.log_alpha[name], log_alpha) < way.log_alpha, (step, name)
        pair = arrays[f"F/multipliers/{name}"][step]
        far = (masks.constraint.multipliers[name].detach().cpu().double() - pair).abs().max()
        assert far <= way.multipliers * max(1.0, float(pair.abs().max())), (step, name)


def check_weights(arrays, way, module):
    """How far the weights moved: at most 1.04e-3, the sum of the rates."""
    moved = arrays.group("F/movement")
    largest = max(float(movement.abs().max()) for movement in moved.values())
    squares, count = 0.0, 0
    for name, tensor in gather_tensors(module):
        start = arrays[f"weights/{name}"].to(way.dtype).double()
        far = tensor.cpu().double() - start - moved.pop(name)
        assert float(far.abs().max()) < way.movement * largest, name
        squares, count = squares + float(far.square().sum()), count + far.numel()
    assert not moved
    assert (squares / count) ** 0.5 < way.movement_rms * largest
