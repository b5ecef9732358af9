"""The masked model on one rank: against plain float64, against no masks, and the exact zeros of what is masked out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.models import GROUPED, MULTI_HEAD, Drawn, build_model
from masks.masked_llama import forward
from megashear.config.model_shape import ModelShape, RopeScaling
from megashear.config.schema import ParallelConfig
from megashear.engine.layout import Layout
from megashear.hf.tensor_names import tensor_shapes
from megashear.masks.mask_values import Masks, norm_gain
from megashear.model.llama import Llama
from megashear.model.weight_io import gather_tensors

SHAPES = [MULTI_HEAD, GROUPED]
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(0, 101, (2, 13), generator=GENERATOR)
INPUT, LABELS = TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()


def model(shape: ModelShape) -> Llama:
    return build_model(shape, ParallelConfig(), Drawn(shape))[1][0]


MASKS = ("hidden", "head", "intermediate", "layer")


def some_masks(shape: ModelShape, dtype: torch.dtype = torch.float32) -> Masks:
    """Masks with zeros (but for layers), ones and values between, leaves of the graph."""
    generator = torch.Generator().manual_seed(2)

    def draw(*size: int, low: float = -0.3) -> Tensor:
        value = low + (1.3 - low) * torch.rand(size, generator=generator)
        return value.clamp(0, 1).to(dtype).requires_grad_()

    layers = shape.num_layers
    head, intermediate = draw(layers, shape.num_heads), draw(layers, shape.intermediate_size)
    return Masks(draw(shape.hidden_size), head, intermediate, draw(layers, low=0.3))


def gradients(module: Llama) -> dict[str, Tensor]:
    return dict(gather_tensors(module, lambda parameter: parameter.grad))


@pytest.mark.parametrize("principal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_loss_and_gradients_equal_plain_float64(layout: Layout, shape: ModelShape, principal: bool) -> None:
    module, masks, wide = model(shape), some_masks(shape), some_masks(shape, torch.float64)
    if principal:
        masks, wide = (replace(one, norm_gain=norm_gain(one.hidden)) for one in (masks, wide))
    loss = module(INPUT, LABELS, masks).mean()
    loss.backward()
    weights = {name: Drawn(shape).read(name).double().requires_grad_() for name in tensor_shapes(shape)}
    logits = forward(INPUT, weights, shape, wide)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    found = gradients(module) | {name: getattr(masks, name).grad for name in MASKS}
    # A head that is masked out is not computed, so its mask's gradient is 0: no hard concrete sample passes it on.
    wide.head.grad[wide.head == 0] = 0
    for name, value in (weights | {name: getattr(wide, name) for name in MASKS}).items():
        worst = (found[name].double() - value.grad).abs().max() / value.grad.abs().max()
        assert float(worst) <= 1e-5, name


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_of_ones_change_no_bit(layout: Layout, shape: ModelShape) -> None:
    module, size = model(shape), shape.num_layers
    ones = Masks(
        torch.ones(shape.hidden_size),
        torch.ones(size, shape.num_heads),
        torch.ones(size, shape.intermediate_size),
        torch.ones(size),
    )
    plain, masked = (module(INPUT, LABELS, masks) for masks in (None, ones))
    assert torch.equal(plain, masked)
    assert torch.equal(module(INPUT, None, None), module(INPUT, None, ones))
    plain.mean().backward()
    without = {name: gradient.clone() for name, gradient in gradients(module).items()}
    module.zero_grad()
    masked.mean().backward()
    for name, gradient in gradients(module).items():
        assert torch.equal(gradient, without[name]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_masked_out_has_exactly_no_gradient(layout: Layout, shape: ModelShape) -> None:
    module, masks = model(shape), some_masks(shape)
    queries, d, group = shape.queries_per_group, shape.head_dim, shape.num_query_groups - 1
    heads = slice(group * queries, (group + 1) * queries)
    with torch.no_grad():
        masks.head[0, heads], masks.intermediate[1, 7], masks.hidden[5] = 0, 0, 0
        masks.layer[:2], masks.layer[2] = 1, 0
    module(INPUT, LABELS, masks).mean().backward()
    found = gradients(module)
    zero = {
        "model.layers.0.self_attn.q_proj.weight": [(0, slice(heads.start * d, heads.stop * d)), (1, 5)],
        "model.layers.0.self_attn.k_proj.weight": [(0, slice(group * d, (group + 1) * d)), (1, 5)],
        "model.layers.0.self_attn.v_proj.weight": [(0, slice(group * d, (group + 1) * d)), (1, 5)],
        "model.layers.0.self_attn.o_proj.weight": [(1, slice(heads.start * d, heads.stop * d)), (0, 5)],
        "model.layers.1.mlp.gate_proj.weight": [(0, 7), (1, 5)],
        "model.layers.1.mlp.up_proj.weight": [(0, 7), (1, 5)],
        "model.layers.1.mlp.down_proj.weight": [(1, 7), (0, 5)],
        "model.layers.0.input_layernorm.weight": [(0, 5)],
        "model.layers.0.post_attention_layernorm.weight": [(0, 5)],
        "model.norm.weight": [(0, 5)],
        "model.embed_tokens.weight": [(1, 5)],
    } | ({} if shape.tie_word_embeddings else {"lm_head.weight": [(1, 5)]})
    for name, places in zero.items():
        assert found[name].any(), f"{name}: no gradient at all"
        for dim, place in places:
            part = found[name][place] if dim == 0 else found[name][:, place]
            assert not part.any(), f"{name}: gradient where it is masked out"
    for name, gradient in found.items():
        if name.startswith("model.layers.2."):
            assert not gradient.any(), f"{name}: gradient in a layer that is masked out"


def test_a_position_table_grows_with_the_sequence(layout: Layout) -> None:
    """Causal attention: a longer sequence changes nothing before, with the rotary frequencies of Llama 3 too."""
    scaled = replace(GROUPED, rope_scaling=RopeScaling(original_max_position_embeddings=16))
    module = model(scaled)
    with torch.no_grad():
        short, long = module(TOKENS[:, :6]), module(TOKENS)
    assert torch.allclose(short, long[:6], atol=1e-5)
    assert not torch.allclose(short, model(GROUPED)(TOKENS[:, :6]), atol=1e-3)


def test_published_masking_leaves_the_embedding(layout: Layout) -> None:
    """With `published` the residual stream keeps what the embedding put on a masked dimension; norms hide it."""
    exact, published = model(MULTI_HEAD), model(MULTI_HEAD)
    published.mask_embedding = False
    masks = some_masks(MULTI_HEAD)
    weights = {name: Drawn(MULTI_HEAD).read(name).double() for name in tensor_shapes(MULTI_HEAD)}
    with torch.no_grad():
        wide = some_masks(MULTI_HEAD, torch.float64)
        for module, masking in ((exact, "exact"), (published, "published")):
            wanted = forward(INPUT, weights, MULTI_HEAD, wide, masking)
            found = module(INPUT, None, masks).transpose(0, 1)
            assert float((found - wanted).abs().max()) <= 1e-4, masking
