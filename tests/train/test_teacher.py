"""What a teacher does to a step: the gradient is the mixture's, the loss told stays cross entropy."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megashear.config.model_shape import ModelShape
from megashear.config.resolve import DistillationPlan
from megashear.config.schema import ParallelConfig
from megashear.config.training_schema import OptimizerConfig
from megashear.engine.layout import Layout, distributed
from megashear.engine.optimizer import WeightOptimizer
from megashear.engine.parallel import transformer_config
from megashear.model.llama import Llama
from megashear.model.micro_batch import MicroBatch
from megashear.model.weight_io import RandomWeights, load_weights
from megashear.train.step import Stepper
from megashear.train.teacher import Teacher

STUDENT = ModelShape(32, 2, 4, 2, 8, 48, 97, tie_word_embeddings=True)
TEACHER = ModelShape(48, 3, 4, 4, 12, 64, 97)


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """A world of one."""
    with distributed(ParallelConfig()) as layout:
        yield layout


def model(shape: ModelShape, layout: Layout, seed: int) -> Llama:
    """A random model in fp32, its weights large enough that logits differ."""
    config = transformer_config(shape, ParallelConfig(), torch.float32)
    module = Llama(shape, config, layout, range(shape.num_layers), True, True)
    load_weights(module, RandomWeights(shape, seed))
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() == 2:
                weight *= 10
    return module


def gradient(layout: Layout, teacher: Teacher | None) -> tuple[list[float], Tensor]:
    """Losses told, and the flat gradient of the student's weights."""
    student = model(STUDENT, layout, 1)
    weights = WeightOptimizer([student], OptimizerConfig(), torch.float32, distributed=False)
    stepper = Stepper(layout, weights, None, 0, 2, clip_norm=1.0, clip_jointly=False, teacher=teacher)
    tokens = torch.randint(0, 97, (3, 2, 17), generator=torch.Generator().manual_seed(2))
    batches = [MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), n) for n, part in enumerate(tokens)]
    losses = stepper.forward_backward(batches, 0).tolist()
    return losses, torch.cat([weight.main_grad.flatten() for weight in student.parameters()])


def test_the_gradient_is_linear_in_the_weight_and_the_loss_is_cross_entropy(layout: Layout) -> None:
    chunks = [model(TEACHER, layout, 3)]
    (plain,), entropy = gradient(layout, None)
    found = {w: gradient(layout, Teacher(chunks, DistillationPlan(w, 2.0, 7), layout)) for w in (0.25, 1.0)}
    assert found[1.0][0][0] == found[0.25][0][0] == pytest.approx(plain, rel=1e-6)
    assert found[1.0][0][1] == found[0.25][0][1] > 0.1
    expected = 0.75 * entropy + 0.25 * found[1.0][1]
    assert (found[0.25][1] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found[1.0][1] - entropy).abs().max() > 0.1 * entropy.abs().max()


def test_a_teacher_equal_to_the_student_is_silent(layout: Layout) -> None:
    """KL and its gradient are nothing but the rounding of products of other sizes; both losses are the same."""
    teacher = Teacher([model(STUDENT, layout, 1)], DistillationPlan(1.0, 1.0, 5), layout)
    (loss, divergence, theirs), found = gradient(layout, teacher)
    _, entropy = gradient(layout, None)
    assert abs(divergence) < 1e-6
    assert theirs == pytest.approx(loss, rel=1e-6)
    assert found.abs().max() < 1e-5 * entropy.abs().max()


def test_a_teacher_is_frozen(layout: Layout) -> None:
    chunk = model(TEACHER, layout, 3)
    before = [weight.clone() for weight in chunk.parameters()]
    teacher = Teacher([chunk], DistillationPlan(0.5), layout)
    gradient(layout, teacher)
    assert all(torch.equal(one, other) for one, other in zip(before, chunk.parameters(), strict=True))
    assert not chunk.training and all(weight.grad is None and not weight.requires_grad for weight in chunk.parameters())
