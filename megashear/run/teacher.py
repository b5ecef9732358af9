"""The teacher of a training stage: the run's source, frozen, on the run's layout.

Read next: `../train/teacher.py`.
"""

from megashear.config.teaching import Teaching
from megashear.engine.parallel import transformer_config
from megashear.errors import ConfigError
from megashear.model.build import filled_chunks
from megashear.run.context import Context
from megashear.train.teacher import Teacher


def build_teacher(context: Context, how: Teaching) -> Teacher | None:
    """The source model on this rank, filled, in the run's dtype; None where `how.weight` is 0.

    Raises ConfigError for a run from scratch (which `megashear check` tells as well).
    """
    if not how.weight:
        return None
    source, layout = context.source, context.layout
    if source is None:
        raise ConfigError("distillation.weight: a run from scratch has no teacher; set it to 0, or give source.folder")
    core = transformer_config(source.shape, context.config.parallel, context.dtype)
    return Teacher(filled_chunks(source.shape, core, layout, source), how, layout)
