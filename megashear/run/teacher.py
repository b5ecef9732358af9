"""The teacher of a training stage: the run's source, frozen, on the run's layout.

Read next: `../train/teacher.py`.
"""

from megashear.config.schema import DistillationConfig
from megashear.engine.parallel import transformer_config
from megashear.engine.pipeline import build_chunks
from megashear.errors import ConfigError
from megashear.model.llama import Llama
from megashear.model.load import load_weights
from megashear.run.context import Context
from megashear.train.teacher import Teacher


def build_teacher(context: Context, how: DistillationConfig) -> Teacher | None:
    """The source model on this rank, filled, in the run's dtype; None where `how.weight` is 0.

    Raises ConfigError for a run from scratch (which `megashear check` tells as well).
    """
    if not how.weight:
        return None
    source, layout = context.source, context.layout
    if source is None:
        raise ConfigError("distillation.weight: a run from scratch has no teacher; set it to 0, or give source.folder")
    core = transformer_config(source.shape, context.config.parallel, context.dtype)

    def build(layers: range, pre: bool, post: bool, stage: int | None) -> Llama:
        return Llama(source.shape, core, layout, layers, pre, post, vp_stage=stage)

    chunks = build_chunks(source.shape.num_layers, layout, build)
    for chunk in chunks:
        load_weights(chunk, source)
    return Teacher(chunks, how, layout)
