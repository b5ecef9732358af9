"""The reference rotary embedding and attention against Hugging Face and the written-out softmax."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megashear.config.model_shape import RopeScaling
from megashear.ops import reference


def _hugging_face(head_dim: int, positions: int, theta: float, scaling: RopeScaling | None):
    parameters = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(positions)[None])


SCALINGS = [None, RopeScaling(), RopeScaling(32.0, 1.0, 4.0, 8192), RopeScaling(4.0, 2.0, 8.0, 64)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 500000.0), (48, 10000.0), (2, 100.0)])
def test_tables_have_the_bits_of_hugging_face(head_dim, theta, scaling):
    cos, sin = reference.rope_tables(head_dim, 300, theta, scaling)
    expected_cos, expected_sin = _hugging_face(head_dim, 300, theta, scaling)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(torch.cat((cos, cos), -1), expected_cos[0])
    assert torch.equal(torch.cat((sin, sin), -1), expected_sin[0])


def test_llama3_scaling_changes_some_frequencies_and_keeps_some():
    plain = reference.rope_tables(128, 2, 500000.0)[1][1]
    scaled = reference.rope_tables(128, 2, 500000.0, RopeScaling())[1][1]
    assert (plain == scaled).any() and (plain > 4 * scaled).any()


def test_rotation_is_hugging_faces():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    cos, sin = _hugging_face(16, 9, 10000.0, None)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    tables = reference.rope_tables(16, 20, 10000.0)  # longer tables serve shorter sequences
    torch.testing.assert_close(reference.apply_rope(q, *tables), expected_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reference.apply_rope(k, *tables), expected_k, rtol=1e-6, atol=1e-6)


def test_split_and_rotation_match_hugging_face():
    torch.manual_seed(4)
    positions, batch, groups, queries, head_dim = 9, 2, 3, 2, 16
    q, k, v = torch.randn(batch, 6, 9, 16), torch.randn(batch, 3, 9, 16), torch.randn(batch, 3, 9, 16)
    rows = []  # of one position and sequence, by hand
    for g in range(groups):
        rows += [q[:, queries * g + i] for i in range(queries)] + [k[:, g], v[:, g]]
    qkv = torch.stack(rows, dim=2).permute(1, 0, 2, 3).reshape(positions, batch, -1)
    tables = reference.rope_tables(head_dim, positions, 10000.0)
    turned_q, turned_k, same_v = reference.rope_qkv(qkv, groups, queries, head_dim, *tables)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, *_hugging_face(head_dim, positions, 10000.0, None))
    torch.testing.assert_close(turned_q, expected_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(turned_k, expected_k, rtol=1e-6, atol=1e-6)
    assert torch.equal(same_v, v)


def test_split_gradients():
    torch.manual_seed(5)
    tables = reference.rope_tables(4, 3, 10000.0)
    qkv = torch.randn(3, 2, 2 * 3 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.rope_qkv(x, 2, 1, 4, *tables), (qkv,))


def test_rotation_keeps_dtype_norm_and_gradients():
    torch.manual_seed(1)
    tables = reference.rope_tables(6, 5, 10000.0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    turned = reference.apply_rope(x, *tables)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)  # tables are fp32
    assert torch.autograd.gradcheck(lambda x: reference.apply_rope(x, *tables), (x,))
    assert reference.apply_rope(x.bfloat16(), *tables).dtype == torch.bfloat16


def _written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, first: torch.Tensor | None
) -> torch.Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape, dtype=torch.bool).triu(1)
    if first is not None:
        for b, row in enumerate(first.tolist()):
            for i, start in enumerate(row):
                hidden[b, :, i, :start] = True
    out = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return out if mask is None else out * mask[:, None, None]


@pytest.mark.parametrize("groups", [6, 2, 1])
def test_attention_is_the_written_out_softmax(groups):
    torch.manual_seed(2)
    q = torch.randn(2, 6, 11, 8, dtype=torch.float64)
    k, v = (torch.randn(2, groups, 11, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([0.0, 1.0, 0.25, 0.5, 1.0, 0.0], dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 7, 9, 10], [0] * 8 + [8] * 3], dtype=torch.int32)
    for heads in (None, mask):
        for first in (None, documents):
            torch.testing.assert_close(
                reference.attention(q, k, v, heads, first), _written_out(q, k, v, heads, first), rtol=1e-12, atol=1e-13
            )


@pytest.mark.parametrize("first", [None, torch.tensor([[0, 0, 0, 3, 3]], dtype=torch.int32)])
def test_attention_gradients(first):
    torch.manual_seed(3)
    q = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([0.75, 1.0, 0.25, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: reference.attention(*inputs, first), (q, k, v, mask))
    dead = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: reference.attention(*inputs, dead, first), (q, k, v))


def test_a_dead_head_gives_its_mask_no_gradient():
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    reference.attention(q, k, v, mask).sum().backward()
    assert mask.grad[0] == 0 and (mask.grad[1:] != 0).all()
