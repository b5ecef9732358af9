"""Fitted output matrices against transformers in float64 and numpy's least squares; what cannot be fitted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from helpers.models import Drawn
from helpers.tiny import Tiny
from importance.oracle import llama
from megashear.importance.least_squares_fit import RIDGE, LeastSquares
from megashear.masks.fold import Folding
from megashear.masks.kept_units import kept_units_of
from megashear.masks.mask_specs import mask_specs
from megashear.model.micro_batch import MicroBatch, document_starts
from parallel.importance_case import BATCHES, drawn_shape, open_loader
from parallel.refit_case import drawn_scores, fitted, fitted_to, kept_masks, target_of

LAYERS, SEQUENCES = 3, 4


def solve(h_NF: np.ndarray, rest_ND: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """The same problem as one of ordinary least squares: rows by the roots of their weights, the ridge as more rows."""
    root_N1 = np.sqrt(weight_N)[:, None]
    inputs = h_NF.shape[1]
    held_FF = np.sqrt(RIDGE * np.square(h_NF * root_N1).sum() / inputs) * np.eye(inputs)
    rest_MD = np.concatenate([rest_ND * root_N1, np.zeros((inputs, rest_ND.shape[1]))])
    return np.linalg.lstsq(np.concatenate([h_NF * root_N1, held_FF]), rest_MD, rcond=None)[0].T


@pytest.fixture(scope="module")
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_NF, rest_ND = (torch.randn(60, size, generator=generator, dtype=torch.float64) for size in (8, 5))
    return h_NF, rest_ND, torch.rand(60, generator=generator, dtype=torch.float64) + 0.1


def test_normal_equations_against_numpy(layout, numbers: tuple[Tensor, Tensor, Tensor]) -> None:
    problem = LeastSquares(8, 5, torch.device("cpu"))
    for part in zip(*(value.split(25) for value in numbers), strict=True):
        problem.add(*part)
    wanted = solve(*(value.numpy() for value in numbers))
    np.testing.assert_allclose(problem.solve().numpy(), wanted, rtol=0, atol=1e-12)


def test_without_inputs_nothing_changes(layout) -> None:
    problem = LeastSquares(3, 2, torch.device("cpu"))
    problem.add(torch.zeros(4, 3), torch.ones(4, 2), torch.ones(4))
    assert not problem.solve().any()


def test_sums_that_are_not_finite_are_told_by_nan(layout) -> None:
    problem = LeastSquares(3, 2, torch.device("cpu"))
    problem.add(torch.full((4, 3), torch.inf), torch.ones(4, 2), torch.ones(4))
    assert problem.solve().isnan().all()


@pytest.mark.parametrize("shape", ["grouped", "multi-head"])
def test_a_cut_model_against_transformers(layout, tiny: Tiny, shape: str) -> None:
    source_shape, masks = drawn_shape(shape, LAYERS), kept_masks(shape, LAYERS)
    keep = kept_units_of(drawn_scores(shape, LAYERS), mask_specs(source_shape, target_of(shape, LAYERS)), source_shape)
    fold = Folding(source_shape, keep, masks)
    drawn = Drawn(source_shape)
    pruned = llama(replace(target_of(shape, LAYERS), tie_word_embeddings=False))
    load(pruned, {name: drawn.read(name).double() for name in drawn.shapes}, fold)
    untouched = {name: value.clone() for name, value in pruned.state_dict().items()}
    fit(llama(source_shape), pruned, keep, sequences(tiny.data))
    found = llama(replace(target_of(shape, LAYERS), tie_word_embeddings=False))
    load(found, {n: v.double() for n, v in fitted(str(tiny.data), shape, {}, LAYERS, SEQUENCES).items()}, fold)
    for name, value in pruned.state_dict().items():
        # fp32 sums of systems whose condition is at most 1 / RIDGE
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=1e-4 * float(value.abs().max()))
        changed = float((value - untouched[name]).abs().max())
        assert (changed > 0.05) == name.endswith(("o_proj.weight", "down_proj.weight")), name


def test_documents_of_one_sequence_are_fitted_as_sequences_of_their_own(layout) -> None:
    """Rotary attention knows distances alone, so that a document does not know where in a sequence it stands."""
    length, separator = 16, 3
    tokens_NS = torch.randint(4, 400, (24, length), generator=torch.Generator().manual_seed(5))
    tokens_NS[:, -1] = separator
    joined_MT = tokens_NS.view(-1, 2 * length)

    def batches(tokens_BS: Tensor, first_BS: Tensor | None = None) -> list[MicroBatch]:
        firsts = len(tokens_BS) * [None] if first_BS is None else first_BS.split(1)
        return [MicroBatch(one, one, i, firsts[i]) for i, one in enumerate(tokens_BS.split(1))]

    texts = [batches(tokens_NS), batches(joined_MT, document_starts(joined_MT, separator)), batches(joined_MT)]
    apart, inside, across = (fitted_to(lambda _, text=text: text, "grouped", {}) for text in texts)
    for name, value in apart.items():
        torch.testing.assert_close(inside[name], value, rtol=0, atol=1e-4 * float(value.abs().max()))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (across[name] - apart[name]).abs().max() > 0.01 * apart[name].abs().max()


def load(model: LlamaForCausalLM, weights: dict[str, Tensor], fold: Folding) -> None:
    """Give a cut model its part of the whole model's weights."""
    cut = dict(part for name, value in weights.items() if (part := fold(name, value)) is not None)
    cut.setdefault("lm_head.weight", cut["model.embed_tokens.weight"])
    model.load_state_dict(cut)


def sequences(data: Path) -> Tensor:
    """The calibration text, [sequences, S]."""
    loader = open_loader(data)
    read = [loader.read(loader.stream.next_batch(SEQUENCES), slice(None))[0] for _ in range(BATCHES)]
    return torch.cat(read).long()[:, :-1]


@torch.no_grad()
def fit(source: LlamaForCausalLM, pruned: LlamaForCausalLM, keep, tokens: Tensor) -> None:
    """The source's layers one after another, and behind each that is kept its likeness in the pruned model."""
    streams = [model.model.embed_tokens(tokens) for model in (source, pruned)]
    positions = torch.arange(tokens.shape[1])[None]
    turns = [model.model.rotary_emb(x, positions) for model, x in zip((source, pruned), streams, strict=True)]
    ahead = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
    kept = {int(layer): number for number, layer in enumerate(keep.layer)}
    for index, layer in enumerate(source.model.layers):
        for branch in ("attention", "mlp"):
            streams[0] = streams[0] + run(layer, branch, streams[0], turns[0], ahead)
            if index not in kept:
                continue
            own = pruned.model.layers[kept[index]]
            matrix, seen = own.self_attn.o_proj if branch == "attention" else own.mlp.down_proj, []
            hook = matrix.register_forward_hook(lambda _, i, o, seen=seen: seen.append(i[0].flatten(0, 1)))
            after = streams[1] + run(own, branch, streams[1], turns[1], ahead)
            hook.remove()
            wanted = streams[0][..., keep.hidden].flatten(0, 1)
            weight = 1 / (wanted.square().mean(1) + source.config.rms_norm_eps)
            rest = wanted - after.flatten(0, 1)
            matrix.weight += torch.from_numpy(solve(seen[0].numpy(), rest.numpy(), weight.numpy()))
            streams[1] = streams[1] + run(own, branch, streams[1], turns[1], ahead)


def run(layer, branch: str, x: Tensor, turn, ahead: Tensor) -> Tensor:
    """What a branch of a transformers layer adds to the stream."""
    if branch == "mlp":
        return layer.mlp(layer.post_attention_layernorm(x))
    return layer.self_attn(layer.input_layernorm(x), position_embeddings=turn, attention_mask=ahead)[0]
