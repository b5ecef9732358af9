"""Steps with a teacher under a layout, and losses over a vocabulary in parts; called on the ranks of `launch.Ranks`."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.models import SHAPES, TARGETS, Drawn, build_model
from megashear.config.model_shape import ModelShape
from megashear.config.resolve import DistillationPlan
from megashear.config.schema import ParallelConfig
from megashear.engine.optimizer import WeightOptimizer
from megashear.engine.parallel import transformer_config
from megashear.engine.pipeline import build_chunks
from megashear.model.llama import Llama
from megashear.model.micro_batch import local_rows, micro_batches
from megashear.model.weight_io import load_weights
from megashear.ops.distillation_loss import VocabularyPart, distillation_losses
from megashear.train.step import Stepper
from megashear.train.teacher import Teacher
from parallel.step_case import LENGTH, PROPORTIONAL, SEED, STEP, some_masks, whole


def taught_step(
    shape: str, parallel: dict[str, Any], prunes: bool, how: dict[str, Any], layers: int = 5, micro: int = 4
) -> dict[str, Any]:
    """Loss, KL, gradients and weights of one step; pruning has the teacher's shape, else the student is smaller."""
    source = replace(SHAPES[shape], num_layers=layers)
    student = source if prunes else replace(TARGETS[shape], num_heads=source.num_heads, num_layers=layers - 1)
    student = replace(student, num_query_groups=source.num_query_groups)
    layout, chunks = build_model(student, ParallelConfig(**parallel), Other(student))
    config = transformer_config(source, ParallelConfig(**parallel), torch.float32)

    def build(layers: range, first: bool, last: bool, stage: int | None) -> Llama:
        return Llama(source, config, layout, layers, first, last, vp_stage=stage)

    taught = build_chunks(source.num_layers, layout, build)
    for chunk in taught:
        load_weights(chunk, Drawn(source))
    weights = WeightOptimizer(chunks, PROPORTIONAL, torch.float32, distributed=False)
    masks = some_masks(source, TARGETS[shape], layout) if prunes else None
    teacher = Teacher(taught, DistillationPlan(**how), layout)
    stepper = Stepper(layout, weights, masks, SEED, 1, clip_norm=1.0, clip_jointly=True, teacher=teacher)
    samples = torch.randint(0, 101, (micro, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    separator = None if prunes else 7
    batches = micro_batches(samples[local_rows(micro, layout, 1)], layout, 1, layout.device, separator)
    losses = stepper.forward_backward(batches, STEP)
    gradients = whole(weights, lambda parameter: parameter.main_grad)
    result = stepper.run(batches, STEP, 1.0, PROPORTIONAL.learning_rate)
    assert [result.loss, result.distillation, result.teacher_loss] == losses.tolist(), "the same step twice"
    return {
        "loss": result.loss,
        "distillation": result.distillation,
        "teacher loss": result.teacher_loss,
        "gradient norm": result.grad_norm,
        "skipped": result.skipped,
        "gradients": gradients,
        "weights": whole(weights),
    }


class Other(Drawn):
    """A student that is not the teacher: its weights by name, scaled."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)

    def read(self, name: str) -> Tensor:
        """The whole tensor in fp32."""
        drawn = super().read(name)
        return drawn if drawn.dim() == 1 else 0.9 * drawn.flip(-1)


def parts_of_a_vocabulary(how: dict[str, Any], vocabulary: int = 101, tokens: int = 37) -> dict[str, Tensor]:
    """Losses and gradient [tokens, columns] with the vocabulary over all ranks, the last of them holding padding."""
    rank, world = dist.get_rank(), dist.get_world_size()
    width = -(-vocabulary // world) + 30  # so that a rank of four holds padding alone
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(tokens, width * world, generator=generator) for _ in range(2))
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    counts = torch.rand(tokens, generator=generator)
    mine = slice(rank * width, (rank + 1) * width)
    leaf = student[:, mine].clone().requires_grad_()
    columns = min(max(vocabulary - rank * width, 0), width)
    part = VocabularyPart(rank * width, columns, dist.group.WORLD)
    losses = distillation_losses(leaf * 1, labels, lambda a, b: teacher[a:b, mine], DistillationPlan(**how), part)
    (losses[0] * counts).sum().backward()
    assert leaf.grad is not None
    gradients = [torch.empty_like(leaf.grad) for _ in range(world)]
    dist.all_gather(gradients, leaf.grad)
    everywhere = [torch.empty_like(losses) for _ in range(world)]
    dist.all_gather(everywhere, losses.detach())
    assert all(torch.equal(one, everywhere[0]) for one in everywhere), "ranks differ"
    whole_part = VocabularyPart(0, vocabulary)
    again = student.clone().requires_grad_()
    alone = distillation_losses(again * 1, labels, lambda a, b: teacher[a:b], DistillationPlan(**how), whole_part)
    (alone[0] * counts).sum().backward()
    assert again.grad is not None
    return {
        "losses": losses.detach(),
        "gradient": torch.cat(gradients, -1),
        "losses alone": alone.detach(),
        "gradient alone": again.grad,
    }
