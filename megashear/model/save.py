"""Putting whole Hugging Face tensors together from the tensor-parallel ranks, one parameter at a time.

Every rank of a tensor-parallel group takes part; all of them see the whole tensor. Read next: `placement.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megashear.engine.collectives import gather_rows
from megashear.model.llama import Llama
from megashear.model.placement import chunk_pieces
from megashear.weights.names import tensor_shapes


def gather_tensors(
    module: Llama, value: Callable[[Tensor], Tensor] = torch.Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of a chunk's parameters, in Hugging Face's form and without vocabulary padding.

    value: what to gather of a parameter (itself, or its gradient, of its shape). The last stage's copy of a tied
    embedding is left out where the first stage has it.
    """
    shapes = tensor_shapes(module.shape)
    layouts = [replace(module.layout, tensor_rank=rank) for rank in range(module.layout.tensor_size)]
    args = (module.layer_range, module.pre_process, module.post_process)
    pieces_by_rank = [chunk_pieces(module.shape, layout, *args) for layout in layouts]
    for name, parameter in module.named_parameters():
        if name == "output.weight" and module.tied:
            continue
        parts = gather_rows(value(parameter)).split(len(parameter))
        whole: dict[str, Tensor] = {}
        for part, pieces in zip(parts, (pieces[name] for pieces in pieces_by_rank), strict=True):
            row = 0
            for piece in pieces:
                if piece.name not in whole:
                    whole[piece.name] = part.new_empty(shapes[piece.name])
                target = whole[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start)
                target.copy_(part[row : row + len(target)])
                row += len(target) + piece.padding
        yield from whole.items()
