"""Pieces cover each Hugging Face tensor once, whatever the shape and the layout."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.config.model_shape import ModelShape
from megashear.engine.layout import Layout, stage_layers
from megashear.hf.tensor_names import tensor_shapes
from megashear.model.tensor_placement import Piece, chunk_pieces


def rank(tensor: int, tensor_rank: int, pipeline: int, stage: int, virtual: int) -> Layout:
    return Layout(tensor, tensor_rank, pipeline, stage, virtual, 1, 0, False, tensor * pipeline, 0, torch.device("cpu"))


@st.composite
def shapes_and_sizes(draw: st.DrawFn) -> tuple[ModelShape, int, int, int]:
    """A shape that a (tensor, pipeline, virtual) layout can carry, also with more ranks than groups."""
    tensor = draw(st.sampled_from([1, 2, 3, 4, 8]))
    shared = draw(st.sampled_from([n for n in (1, 2, 4, 8) if tensor % n == 0]))  # ranks that share one group
    groups = tensor // shared * (draw(st.integers(1, 2)) if shared == 1 else 1)
    queries = draw(st.integers(1, 3)) * shared
    shape = ModelShape(
        hidden_size=tensor * draw(st.integers(1, 3)),
        num_layers=draw(st.integers(1, 7)),
        num_heads=groups * queries,
        num_query_groups=groups,
        head_dim=draw(st.sampled_from([2, 6, 8])),
        intermediate_size=tensor * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 40)),
        tie_word_embeddings=draw(st.booleans()),
    )
    pipeline = draw(st.integers(1, 3))
    # Where rows of query, key and value do not divide by the ranks that share them, the layout is not legal.
    rows = groups * (queries + 2) * shape.head_dim
    if rows % tensor:
        tensor = 1
    return shape, tensor, pipeline, draw(st.integers(1, 2)) if pipeline > 1 else 1


@settings(deadline=None)
@given(shapes_and_sizes())
def test_pieces_cover_every_tensor_once(drawn: tuple[ModelShape, int, int, int]) -> None:
    shape, tensor, pipeline, virtual = drawn
    whole = tensor_shapes(shape)
    times = {name: torch.zeros(size, dtype=torch.int32) for name, size in whole.items()}
    for stage in range(pipeline):
        for chunk in range(virtual):
            first = stage == 0 and chunk == 0
            last = stage == pipeline - 1 and chunk == virtual - 1
            rows = set()
            for tensor_rank in range(tensor):
                layout = rank(tensor, tensor_rank, pipeline, stage, virtual)
                layers = stage_layers(shape.num_layers, layout, chunk)
                for parameter, pieces in chunk_pieces(shape, layout, layers, first, last).items():
                    rows.add((parameter, sum(length(piece) for piece in pieces)))
                    if parameter == "output.weight" and shape.tie_word_embeddings:
                        continue  # the last stage's copy
                    for piece in pieces:
                        assert 0 <= piece.start <= piece.stop <= whole[piece.name][piece.dim]
                        times[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start).add_(1)
            assert len(rows) == len({parameter for parameter, _ in rows}), "ranks differ in a parameter's size"
    for name, count in times.items():
        wanted = tensor if len(count.shape) == 1 else 1  # norms stand whole on every tensor-parallel rank
        assert (count == wanted).all(), name


def length(piece: Piece) -> int:
    """Elements along the cut dimension that a piece brings, padding included."""
    return piece.stop - piece.start + piece.padding
