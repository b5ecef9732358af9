"""Every criterion against transformers in float64: scores, standard errors, scores by domain.

The model runs in float64 as well. What is left between them: scores are kept in fp32, and both take rotary tables in
fp32, rounded each in its way, and transformers its norms; gradients that cancel within a unit make some 1e-6 of that.
"""

from typing import Any

import numpy as np
import pytest
import torch

from helpers.models import Drawn
from helpers.tiny import Tiny
from importance import oracle
from masks import masked_llama
from megashear.dataset.dataset_folder import Dataset
from megashear.engine.layout import Layout
from megashear.importance.criteria import magnitudes
from megashear.masks.mask_values import assemble
from megashear.mixture.blend import BlendedStream, sources
from parallel.importance_case import BATCHES, RUNS, drawn_shape, open_loader, score

TOLERANCE = 5e-6
SHAPES = ["multi-head", "grouped"]


def close(found: Any, wanted: np.ndarray, what: str) -> None:
    worst = np.abs(np.asarray(found, dtype=np.float64) - wanted).max() / np.abs(wanted).max()
    assert worst <= TOLERANCE, f"{what}: {worst:.1e}"


@pytest.mark.parametrize("name", SHAPES)
def test_scores_are_those_of_transformers(layout: Layout, tiny: Tiny, name: str) -> None:
    shape = drawn_shape(name)
    model, loader = oracle.llama(shape), open_loader(tiny.data)
    values, domains = [], []
    for _ in range(BATCHES):
        samples, domain_N = loader.read(loader.stream.next_batch(4), slice(None))
        values.append([oracle.sequence_values(model, shape, tokens) for tokens in samples.long()])
        domains += [loader.stream.names[index] for index in domain_N]
    found = score(str(tiny.data), name, {}, dtype="float64")
    assert found.keys() == RUNS.keys()
    for run, one in found.items():
        assert one["samples"] == {domain: domains.count(domain) for domain in loader.stream.names}
        assert one["units"].keys() == one["errors"].keys() == one["criteria"].keys()
        assert ("query" in one["units"]) == (shape.queries_per_group > 1)
        for granularity, criterion in one["criteria"].items():
            wanted, error = oracle.scores(values, criterion, granularity)
            close(one["units"][granularity], wanted, f"{run} {granularity}")
            close(one["errors"][granularity], error, f"error of {run} {granularity}")
            for domain in set(domains):
                own = [
                    v[criterion][granularity] for v, d in zip(oracle.flat(values), domains, strict=True) if d == domain
                ]
                total = np.sqrt(np.sum(own, axis=0)) if criterion == "activation" else np.mean(own, axis=0)
                close(one["domains"][domain][granularity], total, f"{run} {granularity} on {domain}")


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_on_a_mask_is_the_loss_s_slope(tiny: Tiny, name: str) -> None:
    """transformers' gradient on scaled weights against differences of a masked LLaMA's loss, masks at 1 +- h."""
    shape, step = drawn_shape(name), 1e-4
    loader, weights = open_loader(tiny.data), {part: Drawn(shape).read(part).double() for part in Drawn(shape).shapes}
    tokens = loader.read(loader.stream.next_batch(1), slice(None))[0].long()[0]
    gradients = oracle.mask_gradients(oracle.llama(shape), shape, tokens)
    for granularity, gradient in gradients.items():
        if granularity == "query" and shape.queries_per_group == 1:
            continue
        unit, ends = int(np.abs(gradient).argmax()), []
        for sign in (1, -1):
            z = oracle.ones(shape)
            z[granularity].view(-1)[unit] += sign * step
            logits = masked_llama.forward(tokens[None, :-1], weights, shape, assemble(z, shape))[0]
            ends.append(float(torch.nn.functional.cross_entropy(logits, tokens[1:])))
        assert gradient.flat[unit] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=TOLERANCE), granularity


def test_scores_of_a_model_in_bf16_are_near(layout: Layout, tiny: Tiny) -> None:
    """Activations and gradients are off by up to 2^-9 each, which mostly cancels: a few hundredths of the largest.

    Fisher scores are squares, and differ by twice as much.
    """
    exact, rough = (score(str(tiny.data), "grouped", {}, dtype=dtype) for dtype in ("float64", "bfloat16"))
    for run, one in exact.items():
        for granularity, value in one["units"].items():
            worst = (rough[run]["units"][granularity] - value).abs().max() / value.max()
            assert worst <= (0.1 if run == "fisher" else 0.05), f"{run} {granularity}: {worst:.1e}"


@pytest.mark.parametrize("name", SHAPES)
def test_magnitude_is_the_norm_of_a_unit_s_weights(name: str) -> None:
    shape = drawn_shape(name)
    squares = {part: Drawn(shape).read(part).double().square().numpy() for part in Drawn(shape).shapes}
    wanted = oracle.of_units(shape, squares)
    found = magnitudes(Drawn(shape), shape)
    assert set(found) == set(wanted) - ({"query"} if shape.queries_per_group == 1 else set())
    for granularity, value in found.items():
        np.testing.assert_allclose(value, np.sqrt(wanted[granularity]), rtol=1e-12)


def test_calibration_text_is_drawn_by_weights_and_is_not_the_training_stream_s(tiny: Tiny) -> None:
    loader = open_loader(tiny.data)
    plan = loader.stream.next_batch(100)
    assert np.bincount(plan.domain_B).tolist() == [50, 30, 20]
    assert open_loader(tiny.data).stream.next_batch(100).same(plan)
    weights = dict(zip(loader.stream.names, loader.stream.weights, strict=True))
    training = BlendedStream(sources(Dataset.open(tiny.data), loader.sequence_length), 5, weights).next_batch(100)
    assert not training.same(plan)
